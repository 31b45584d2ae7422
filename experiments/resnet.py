"""Residual network: ResNet-18 to 152, or the 6n + 2 layers for small images.

He et al. 2015, "Deep residual learning for image recognition" (arXiv:1512.03385).

    python launch.py --experiment=resnet
    python launch.py --experiment=resnet --depth=20 --width=16 --dataset=idx:DIR --batch=128
        --steps=3600 --warmup=300 --flip --label_smoothing=0 --eval_batch=1000 --eval_every=0
        --optimizer=muon --peak_lr=0.03 --l2=0 --weight_decay=0.05

Full size, ResNet-50 with 25,557,032 parameters, the recipe of torchvision
(references/classification: 90 epochs of 5,005 steps, the rate divided by ten every 30; biases and
norms are decayed there too). Its IMAGENET1K_V1 weights have 76.130 % top-1
(pytorch.org/vision/stable/models); not yet run here:

    python launch.py --experiment=resnet --depth=50 --dataset=tfds:imagenet2012 --image_size=224
        --normalize=imagenet --crop=0.08 --flip --shift=0 --eval_crop=0.875 --label_smoothing=0
        --schedule=step --decay_every=150150 --decay_factor=0.1 --peak_lr=0.1 --warmup=0 --l2=1e-4
        --batch=256 --steps=450450 --eval_every=5005 --save_every=5005

Measured on two CPU cores, one seed: digits, 20 layers, 99.7 % in 40 s; Fashion-MNIST, by the second
command, less than eight epochs, 94.1 % test accuracy in 26:50 (the machine was shared).
"""

from typing import Any

import jax.numpy as jnp

from bigjax.experiment import Experiment, Run
from bigjax.models import resnet
from bigjax.nn.implementation import Implementation
from bigjax.optimizers import Optim
from bigjax.pretrained import resnet as kept
from bigjax.recipes.vision import Images, image_classification


def experiment(
    *,
    depth: int = 20,
    width: int = 0,
    conv: Implementation = 'auto',
    pretrained: str = '',
    images: Images = Images(shift=1),
    run: Run = Run(steps=600, batch=64, eval_every=200, monitor='test/accuracy'),
    optim: Optim = Optim(
        optimizer='sgd', peak_lr=0.1, warmup=50, end_lr=0.0, momentum=0.9, l2=5e-4
    ),
) -> Experiment:
    """Builds the run.

    Args:
      depth: layers: 18, 34, 50, 101 or 152; or 20, 32, 44, 56 or 110 for small images
      width: channels of the first stage; 0 is the published width
      conv: implementation of convolutions; auto takes the kernel of the chip where it is faster
      pretrained: folder or .safetensors file to start from; empty starts at random
    """
    data = images.open(run.data_dir)
    size, channels = data.image_shape[:2], data.image_shape[2]
    shape: dict[str, Any] = {'depth': depth, 'width': width, 'small_stem': max(size) <= 64}
    model = resnet.ResNet(
        classes=data.num_classes, conv_impl=conv, dtype=jnp.dtype(images.dtype), **shape
    )
    flops = resnet.forward_flops(size, channels, data.num_classes, **shape)
    return image_classification(
        model,
        data,
        images=images,
        run=run,
        optim=optim,
        rules=resnet.RULES,
        forward_flops=flops,
        pretrained=kept.pretrained(model, pretrained, channels=channels),
    )
