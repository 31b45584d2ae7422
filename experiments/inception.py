"""Inception: versions 1 (GoogLeNet with BatchNorm) and 3, on ImageNet or small images.

Szegedy et al. 2014, "Going deeper with convolutions" (arXiv:1409.4842), and 2015, "Rethinking the
Inception architecture for computer vision" (arXiv:1512.00567).

    python launch.py --experiment=inception
    python launch.py --experiment=inception --dataset=idx:DIR --width=8 --batch=128
        --steps=1500 --warmup=150 --eval_every=750 --eval_batch=500 --flip --label_smoothing=0
        --optimizer=muon --peak_lr=0.03 --l2=0 --weight_decay=0.05

Full size, 27,161,264 parameters with the auxiliary head. torchvision's weights, which are those of
Google, have 77.294 % top-1 (pytorch.org/vision/stable/models; version 1, at 224 pixels, 6,624,904
parameters without auxiliary heads, 69.778 %). The recipe is §8 of the 2015 paper: 100 epochs on 50
replicas of 32 images each, RMSProp, a rate that falls by 6 % every two epochs, averaged weights.
What it leaves open (momentum, L2, the average's decay, crops, the auxiliary loss) is as in
TensorFlow's inception_distributed_train.py. Not yet run here:

    python launch.py --experiment=inception --version=3 --dataset=tfds:imagenet2012
        --image_size=299 --width=0 --auxiliary=0.4 --normalize=half --crop=0.05 --flip --shift=0
        --eval_crop=0.875 --label_smoothing=0.1 --optimizer=rmsprop --b2=0.9 --eps=1 --momentum=0.9
        --clip=2 --schedule=step --decay_every=1601 --decay_factor=0.94 --peak_lr=0.045 --warmup=0
        --l2=4e-5 --ema=0.9999 --batch=1600 --steps=80073 --eval_every=801 --save_every=801

Measured on two CPU cores, one seed, version 1: digits 98.9 % in 1:20; Fashion-MNIST,
by the second command, 89.1 % test accuracy after 750 steps and 91.8 % after 1,500, in 11:52.
"""

from typing import Any

import jax.numpy as jnp

from bigjax.experiment import Experiment, Run
from bigjax.models import inception
from bigjax.nn.implementation import Implementation
from bigjax.optimizers import Optim
from bigjax.pretrained import inception as kept
from bigjax.recipes.vision import Images, image_classification


def experiment(
    *,
    version: int = 1,
    width: int = 16,
    auxiliary: float = 0.3,
    dropout: float = -1.0,
    conv: Implementation = 'auto',
    pretrained: str = '',
    images: Images = Images(shift=1),
    run: Run = Run(steps=400, batch=64, eval_every=200, monitor='test/accuracy'),
    optim: Optim = Optim(optimizer='sgd', peak_lr=0.1, warmup=50, end_lr=0.0, l2=5e-4),
) -> Experiment:
    """Builds the run.

    Args:
      version: 1 or 3
      width: channels of the first convolution, with which all others scale; 0 is as published
      auxiliary: by what the losses of the auxiliary heads are multiplied; 0 is without such heads
      dropout: share of the last features zeroed in training; below 0 it is as published
      conv: implementation of convolutions; auto takes the kernel of the chip where it is faster
      pretrained: folder or .safetensors file to start from; empty starts at random
    """
    data = images.open(run.data_dir)
    size, channels = data.image_shape[:2], data.image_shape[2]
    shape: dict[str, Any] = {
        'version': version,
        'width': width,
        'small_stem': max(size) <= 64,
        'auxiliary': auxiliary > 0,
    }
    model = inception.Inception(
        classes=data.num_classes,
        dropout=dropout,
        conv_impl=conv,
        dtype=jnp.dtype(images.dtype),
        **shape,
    )
    heads = len(inception.size(version).auxiliary) if auxiliary > 0 else 0
    return image_classification(
        model,
        data,
        images=images,
        run=run,
        optim=optim,
        rules=inception.RULES,
        forward_flops=inception.forward_flops(size, channels, data.num_classes, **shape),
        aux_weights=(auxiliary,) * heads,
        pretrained=kept.pretrained(model, pretrained),
    )
