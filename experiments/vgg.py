"""VGG: 11, 13, 16 or 19 layers of 3×3 convolutions, on ImageNet or small images.

Simonyan and Zisserman 2014, "Very deep convolutional networks for large-scale image recognition"
(arXiv:1409.1556).

    python launch.py --experiment=vgg
    python launch.py --experiment=vgg --dataset=idx:DIR --width=32 --batch=128 --steps=2400
        --warmup=200 --eval_every=1200 --eval_batch=500 --flip --label_smoothing=0
        --optimizer=muon --peak_lr=0.03 --l2=0 --weight_decay=0.05

Full size, 138,357,544 parameters, the recipe of torchvision (references/classification: 90 epochs
of 5,005 steps, the rate divided by ten every 30; biases and norms are decayed there too). Its
weights have 71.592 % top-1, and with --batch_norm --peak_lr=0.1 73.360 %
(pytorch.org/vision/stable/models); not yet run here:

    python launch.py --experiment=vgg --dataset=tfds:imagenet2012 --image_size=224 --depth=16
        --width=0 --hidden=0 --dropout=0.5 --nobatch_norm --normalize=imagenet --crop=0.08 --flip
        --shift=0 --eval_crop=0.875 --label_smoothing=0 --schedule=step --decay_every=150150
        --decay_factor=0.1 --peak_lr=0.01 --warmup=0 --l2=1e-4 --batch=256 --steps=450450
        --eval_every=5005 --save_every=5005

Measured on two CPU cores, one seed: digits 98.6 % in 31 s; Fashion-MNIST, by the second command,
88.0 % test accuracy after 1,200 steps and 92.8 % after 2,400, in 12:41. SGD as by default gave
87.7 % after 2,500.
"""

from typing import Any

import jax.numpy as jnp

from bigjax.experiment import Experiment, Run
from bigjax.models import vgg
from bigjax.nn.implementation import Implementation
from bigjax.optimizers import Optim
from bigjax.pretrained import vgg as kept
from bigjax.recipes.vision import Images, image_classification


def experiment(
    *,
    depth: int = 11,
    batch_norm: bool = True,
    width: int = 16,
    hidden: int = 128,
    dropout: float = 0.3,
    conv: Implementation = 'auto',
    pretrained: str = '',
    images: Images = Images(shift=1),
    run: Run = Run(steps=1000, batch=64, eval_every=500, monitor='test/accuracy'),
    optim: Optim = Optim(optimizer='sgd', peak_lr=0.1, warmup=50, end_lr=0.0, l2=5e-4),
) -> Experiment:
    """Builds the run.

    Args:
      depth: layers: 11, 13, 16 or 19
      batch_norm: whether every convolution is followed by BatchNorm
      width: channels of the first stage, with which the others scale; 0 is 64, as published
      hidden: units of both hidden dense layers; 0 is 4096, as published
      dropout: share of the hidden dense layers' units zeroed in training
      conv: implementation of convolutions; auto takes the kernel of the chip where it is faster
      pretrained: folder or .safetensors file to start from; empty starts at random
    """
    data = images.open(run.data_dir)
    size, channels = data.image_shape[:2], data.image_shape[2]
    shape: dict[str, Any] = {
        'depth': depth,
        'width': width,
        'hidden': hidden,
        'small_stem': max(size) <= 64,
    }
    model = vgg.VGG(
        classes=data.num_classes,
        batch_norm=batch_norm,
        dropout=dropout,
        conv_impl=conv,
        dtype=jnp.dtype(images.dtype),
        **shape,
    )
    flops = vgg.forward_flops(size, channels, data.num_classes, **shape)
    return image_classification(
        model,
        data,
        images=images,
        run=run,
        optim=optim,
        rules=vgg.RULES,
        forward_flops=flops,
        pretrained=kept.pretrained(model, pretrained),
    )
