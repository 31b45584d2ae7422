"""Image classification from knobs: what all vision experiments share, whatever their model."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bigjax.data import augment
from bigjax.data.crops import RandomCrop
from bigjax.data.framed import Frame
from bigjax.data.images import ImageData, open_images
from bigjax.data.mixing import Mix
from bigjax.data.pipeline import Augment
from bigjax.data.randaugment import RandAugment
from bigjax.experiment import Data, Experiment
from bigjax.optimizers import Optim, make_optimizer
from bigjax.run import Run, UsageError, need
from bigjax.sharding import Rule
from bigjax.tasks.classification import classification, standardize

# What `--normalize` removes: mean and standard deviation of each channel, in 0 .. 255.
STATISTICS = {
    'imagenet': (
        255 * np.array([0.485, 0.456, 0.406], np.float32),
        255 * np.array([0.229, 0.224, 0.225], np.float32),
    ),
    'half': (np.array([127.5], np.float32), np.array([127.5], np.float32)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """Which images, and what is done to them.

    Attributes:
      dataset: digits, tfds:NAME, idx:DIR, images:DIR, or blank:CLASSES (to measure speed)
      image_size: side that images are resized to; 0 keeps their own
      channels: 1 makes images grey and 3 coloured; 0 keeps what they have
      num_classes: classes that the model tells apart; 0 takes the data's
      normalize: mean and deviation removed: the data's own, ImageNet's, or half of 255 for both
      eval_crop: share of the shorter side that evaluation sees, and training without --crop
      label_smoothing: probability spread over all classes in training
      flip: whether training images are mirrored at random
      shift: pixels that training images are shifted by at most
      crop: least share of the area of a random part that training sees (0.08 is usual); 0 is off
      randaugment: changes that each training image goes through (2 is usual); 0 is off
      magnitude: strength of --randaugment, 0 to 10
      erase: probability that noise covers a part of a training image
      mixup: images and labels mixed by shares of beta(MIXUP, MIXUP) (0.2 is usual); 0 is off
      cutmix: parts of another image, by shares of beta(CUTMIX, CUTMIX) (1 is usual); 0 is off
      dtype: type of the computation; parameters and statistics are float32
    """

    dataset: str = 'digits'
    image_size: int = 0
    channels: int = 0
    num_classes: int = 0
    normalize: Literal['data', 'imagenet', 'half'] = 'data'
    eval_crop: float = 1.0
    label_smoothing: float = 0.1
    flip: bool = False
    shift: int = 0
    crop: float = 0.0
    randaugment: int = 0
    magnitude: float = 5.0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    dtype: Literal['float32', 'bfloat16'] = 'float32'

    def __post_init__(self) -> None:
        for name, rule, ok, works in (
            ('image_size', 'must not be negative', self.image_size >= 0, 0),
            ('channels', 'must be 0, 1 or 3', self.channels in (0, 1, 3), 3),
            ('num_classes', 'must not be negative', self.num_classes >= 0, 0),
            ('eval_crop', 'must be above 0 and at most 1', 0 < self.eval_crop <= 1, 0.875),
            ('label_smoothing', 'must be between 0 and 1', 0 <= self.label_smoothing <= 1, 0.1),
            ('shift', 'must not be negative', self.shift >= 0, 1),
            ('crop', 'must be between 0 and 1', 0 <= self.crop <= 1, 0.08),
            ('randaugment', 'must not be negative', self.randaugment >= 0, 2),
            ('magnitude', 'must be between 0 and 10', 0 <= self.magnitude <= 10, 5),
            ('erase', 'must be between 0 and 1', 0 <= self.erase <= 1, 0.25),
            ('mixup', 'must be at least 0 and finite', 0 <= self.mixup < math.inf, 0.2),
            ('cutmix', 'must be at least 0 and finite', 0 <= self.cutmix < math.inf, 1),
        ):
            need(ok, self, name, rule, works)

    def open(self, data_dir: str) -> ImageData:
        """Returns the data set; with `num_classes`, it has that many class names.

        Raises:
          UsageError: there is no such data set, or it does not go with the other knobs.
        """
        frame = Frame(self.image_size, self.channels, self.eval_crop, self.crop > 0)
        data = open_images(self.dataset, data_dir=data_dir, frame=frame)
        channels = data.image_shape[-1]
        if channels != 3 and self.normalize == 'imagenet':
            raise UsageError(
                f'--normalize=imagenet: is for three channels, and --dataset={self.dataset} has '
                f'{channels}; try --channels=3'
            )
        if channels not in (1, 3) and self.randaugment:
            raise UsageError(
                f'--randaugment={self.randaugment}: is for one or three channels, and '
                f'--dataset={self.dataset} has {channels}; try --channels=3'
            )
        if not self.num_classes:
            return data
        if self.num_classes < data.num_classes:
            raise UsageError(
                f'--num_classes={self.num_classes}: --dataset={self.dataset} has '
                f'{data.num_classes} classes; try --num_classes={data.num_classes}'
            )
        more = (f'class {number}' for number in range(data.num_classes, self.num_classes))
        return dataclasses.replace(data, class_names=(*data.class_names, *more))

    def augment(self, size: tuple[int, int]) -> Augment:
        """Returns what training batches go through to be images of `size`, in this order."""
        steps: list[Augment] = []
        if self.crop:
            steps.append(RandomCrop(size, self.crop))
        if self.flip:
            steps.append(augment.flip)
        if self.shift:
            steps.append(augment.Shift(self.shift))
        if self.randaugment:
            steps.append(RandAugment(self.randaugment, self.magnitude))
        if self.erase:
            steps.append(augment.Erase(self.erase))
        if self.mixup or self.cutmix:
            steps.append(Mix(self.mixup, self.cutmix))
        return augment.chain(*steps)


def image_classification(
    model: nn.Module,
    data: ImageData,
    *,
    images: Images,
    run: Run,
    optim: Optim,
    rules: Sequence[Rule],
    forward_flops: int,
    aux_weights: tuple[float, ...] = (),
    **more: Any,
) -> Experiment:
    """Returns the experiment of training `model` to tell the classes of `data` apart.

    Args:
      model: float images [B, H, W, C] and `train` -> logits [B, classes]; or, in training, a
        tuple of the logits and those of each auxiliary head.
      data: what `images.open` returned.
      images: knobs of the data.
      run: knobs of the run.
      optim: knobs of the optimizer.
      rules: the model's sharding rules.
      forward_flops: closed-form operations of one image's forward pass.
      aux_weights: by what the loss of each auxiliary head is multiplied in training.
      more: further fields of Experiment, such as `pretrained`.
    """
    optimizer, schedule = make_optimizer(optim, steps=run.steps)
    task = classification(
        model,
        inputs='image',
        example=jax.ShapeDtypeStruct(data.image_shape, jnp.uint8),
        class_names=data.class_names,
        forward_flops=forward_flops,
        unit='images',
        label_smoothing=images.label_smoothing,
        preprocess=standardize(*STATISTICS.get(images.normalize) or data.statistics),
        aux_weights=aux_weights,
    )
    return Experiment(
        task=task,
        optimizer=optimizer,
        schedule=schedule,
        nonfinite=optim.nonfinite,
        data=Data(train=data.train, evals={'test': data.test}, card=data.card),
        augment=images.augment(data.image_shape[:2]),
        rules=rules,
        run=run,
        **more,
    )
