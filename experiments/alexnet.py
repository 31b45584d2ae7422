"""AlexNet: five convolutions and three dense layers, on ImageNet or small images.

Krizhevsky et al. 2012, "ImageNet classification with deep convolutional neural networks", in the
single-tower form of Krizhevsky 2014 (arXiv:1404.5997).

    python launch.py --experiment=alexnet
    python launch.py --experiment=alexnet --dataset=idx:DIR --width=32 --hidden=256 --batch=128
        --steps=2000 --eval_every=1000 --eval_batch=500 --flip --ema=0.999

Full size, 61,100,840 parameters, the recipe of torchvision (references/classification: 90 epochs of
5,005 steps, the rate divided by ten every 30; biases are decayed there too). Its weights have
56.522 % top-1 (pytorch.org/vision/stable/models); not yet run here:

    python launch.py --experiment=alexnet --dataset=tfds:imagenet2012 --image_size=224 --width=0
        --hidden=0 --normalize=imagenet --crop=0.08 --flip --shift=0 --eval_crop=0.875
        --label_smoothing=0 --optimizer=sgd --schedule=step --decay_every=150150 --decay_factor=0.1
        --peak_lr=0.01 --warmup=0 --weight_decay=0 --l2=1e-4 --ema=0 --batch=256 --steps=450450
        --eval_every=5005 --save_every=5005

Measured on two CPU cores, one seed: digits 98.6 % in 42 s; Fashion-MNIST, by the second command,
86.0 % test accuracy after 1,000 steps and 90.1 % after 2,000, in 8:44.
"""

from typing import Any

import jax.numpy as jnp

from bigjax.experiment import Experiment, Run
from bigjax.models import alexnet
from bigjax.nn.implementation import Implementation
from bigjax.optimizers import Optim
from bigjax.pretrained import alexnet as kept
from bigjax.recipes.vision import Images, image_classification


def experiment(
    *,
    width: int = 16,
    hidden: int = 128,
    dropout: float = 0.5,
    conv: Implementation = 'auto',
    pretrained: str = '',
    images: Images = Images(label_smoothing=0.05, shift=1),
    run: Run = Run(steps=1000, batch=64, eval_every=500, monitor='test/accuracy'),
    optim: Optim = Optim(peak_lr=2e-3, warmup=50, end_lr=0.0, weight_decay=0.05, ema=0.99),
) -> Experiment:
    """Builds the run.

    Args:
      width: channels of the first convolution, with which the others scale; 0 is 64, as published
      hidden: units of both hidden dense layers; 0 is 4096, as published
      dropout: share of what the hidden dense layers read that is zeroed in training
      conv: implementation of convolutions; auto takes the kernel of the chip where it is faster
      pretrained: folder or .safetensors file to start from; empty starts at random
    """
    data = images.open(run.data_dir)
    size, channels = data.image_shape[:2], data.image_shape[2]
    shape: dict[str, Any] = {'width': width, 'hidden': hidden, 'small_stem': max(size) <= 64}
    model = alexnet.AlexNet(
        classes=data.num_classes,
        dropout=dropout,
        conv_impl=conv,
        dtype=jnp.dtype(images.dtype),
        **shape,
    )
    flops = alexnet.forward_flops(size, channels, data.num_classes, **shape)
    return image_classification(
        model,
        data,
        images=images,
        run=run,
        optim=optim,
        rules=alexnet.RULES,
        forward_flops=flops,
        pretrained=kept.pretrained(model, pretrained),
    )
