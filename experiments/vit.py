"""Vision Transformer: an image as a sequence of patches, on ImageNet or small images.

Dosovitskiy et al. 2020, "An image is worth 16×16 words" (arXiv:2010.11929).

    python launch.py --experiment=vit
    python launch.py --experiment=vit --dataset=idx:DIR --variant=Ti/4 --depth=4 --batch=128
        --steps=4500 --warmup=400 --optimizer=muon --momentum=0.95 --peak_lr=6e-3
        --eval_every=2250 --eval_batch=500 --flip --ema=0.99 --label_smoothing=0

Full size, the recipe of Beyer et al. 2022, "Better plain ViT baselines for ImageNet-1k"
(arXiv:2205.01580), where 90 epochs give S/16 76.5 % top-1 (big_vision's configs/vit_s16_i1k.py,
which has a hidden layer in the head and keeps 1 % of the images back; not yet run here). The
published ViT has --pool=token --positions=learned: S/16 22,050,664 parameters, B/16 86,567,656.

    python launch.py --experiment=vit --dataset=tfds:imagenet2012 --image_size=224 --variant=S/16
        --depth=0 --heads=0 --width=0 --pool=mean --positions=sincos2d --normalize=half --crop=0.05
        --flip --shift=0 --eval_crop=0.875 --randaugment=2 --magnitude=10 --mixup=0.2
        --label_smoothing=0 --batch=1024 --steps=112600 --warmup=10000 --peak_lr=1e-3 --b2=0.999
        --weight_decay=0.1 --clip=1 --ema=0 --dtype=bfloat16 --eval_every=1251 --save_every=1251

Measured on two CPU cores, one seed: digits 97.8 % in 35 s; Fashion-MNIST, by the second command,
90.2 % test accuracy after 2,250 steps and 92.2 % after 4,500, in 11:15. AdamW at 2e-3 had 84.8 %
after 2,500 and 89.3 % after 5,000.
"""

from typing import Any, Literal

import jax.numpy as jnp

from bigjax.experiment import Experiment, Run
from bigjax.models import vit
from bigjax.nn.attention import Implementation
from bigjax.optimizers import Optim
from bigjax.pretrained import vit as kept
from bigjax.recipes.vision import Images, image_classification
from bigjax.strategy import Remat


def experiment(
    *,
    variant: str = 'Ti/2',
    depth: int = 3,
    heads: int = 4,
    width: int = 64,
    pool: Literal['token', 'mean'] = 'mean',
    positions: Literal['learned', 'sincos2d'] = 'sincos2d',
    dropout: float = 0.0,
    drop_path: float = 0.0,
    scan: bool = False,
    remat: Remat = 'none',
    attention: Implementation = 'auto',
    pretrained: str = '',
    images: Images = Images(shift=1),
    run: Run = Run(steps=1500, batch=64, eval_every=500, monitor='test/accuracy'),
    optim: Optim = Optim(
        peak_lr=3e-3, warmup=100, end_lr=0.0, b2=0.999, weight_decay=0.1, clip=1.0, ema=0.99
    ),
) -> Experiment:
    """Builds the run.

    Args:
      variant: size (Ti, S, B, L or H), a slash and the side of a patch in pixels
      depth: number of layers; 0 is the variant's
      heads: number of attention heads; 0 is the variant's
      width: width of the residual stream; 0 is the variant's
      pool: what the head reads: a class token's place, or the mean of all patches
      positions: learned, or fixed sines and cosines of row and column
      dropout: share of embeddings and branches zeroed in training
      drop_path: share of images that skip the last layer's branches; less in the layers before
      scan: whether layers are scanned: compiles faster, runs slower on a CPU
      remat: what is computed again for the gradient, to save memory
      attention: implementation of attention; auto takes the kernel of the chip, xla on a CPU
      pretrained: folder or .safetensors file to start from; empty starts at random
    """
    data = images.open(run.data_dir)
    size, channels = data.image_shape[:2], data.image_shape[2]
    shape: dict[str, Any] = {
        'variant': variant,
        'depth': depth,
        'heads': heads,
        'width': width,
        'pool': pool,
    }
    model = vit.ViT(
        classes=data.num_classes,
        positions=positions,
        dropout=dropout,
        drop_path=drop_path,
        scan=scan,
        remat=remat,
        attention_impl=attention,
        dtype=jnp.dtype(images.dtype),
        **shape,
    )
    flops = vit.forward_flops(size, channels, data.num_classes, **shape)
    return image_classification(
        model,
        data,
        images=images,
        run=run,
        optim=optim,
        rules=vit.RULES,
        forward_flops=flops,
        pretrained=kept.pretrained(model, pretrained, image_size=size[0], channels=channels),
    )
