"""Classification: predicting one label of an example."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bigjax import losses
from bigjax.task import Task, apply, row_weight

# Where there are more classes than this, the label may also be among the five likeliest.
TOP_5_ABOVE = 100
# Beyond, the matrix would outgrow the model that is evaluated.
MATRIX_UP_TO = 1000


def standardize(mean_C: np.ndarray, std_C: np.ndarray) -> Callable[[jax.Array], jax.Array]:
    """Returns `uint8 [B, H, W, C] -> float32`, each channel with the given statistics removed."""
    shape = (1, 1, 1, -1)

    def apply(image_BHWC: jax.Array) -> jax.Array:
        return (image_BHWC.astype(jnp.float32) - mean_C.reshape(shape)) / std_C.reshape(shape)

    return apply


def classification(
    model: nn.Module,
    *,
    inputs: str,
    example: jax.ShapeDtypeStruct,
    class_names: tuple[str, ...],
    forward_flops: int,
    unit: str,
    units_per_example: int = 1,
    label_smoothing: float = 0.0,
    preprocess: Callable[[jax.Array], jax.Array] = lambda x: x,
    aux_weights: tuple[float, ...] = (),
) -> Task:
    """Returns the task of predicting `batch['label']` from `batch[inputs]`.

    A batch with 'mix_share' and 'mix_box' is of mixed images (see `mixed`): the loss is then the
    cross entropy against both labels by their shares, and the accuracy what the predicted class
    has of them.

    Args:
      model: called with inputs [B, …] and `train`; gives logits [B, C], or, in training, a tuple
        of the logits and those of each auxiliary head, whose parameters must be there from init,
        which is called without `train` (see nn.Module.is_initializing).
      inputs: key of the batch that the model reads.
      example: shape and dtype of one example, without the batch axis.
      class_names: names of the C classes.
      forward_flops: closed-form operations of one example's forward pass.
      unit: what rates are counted in.
      units_per_example: how many units one example has.
      label_smoothing: probability mass spread over all classes in training.
      preprocess: applied to the inputs on the device, before the model.
      aux_weights: by what the loss of each auxiliary head is multiplied; its sum joins the loss
        that is trained (Szegedy et al. 2014, section 5).
    """

    def init(key: jax.Array) -> dict[str, Any]:
        inputs = preprocess(jnp.zeros((1, *example.shape), example.dtype))
        return dict(model.init(key, inputs, train=False))

    def loss(params, extra, batch, key, train):
        x, label_B = batch[inputs], batch['label']
        # Each row has one label, or shares of two.
        labels = [(label_B, None)]
        if 'mix_share' in batch:
            x, own_B = mixed(x, batch['mix_share'], batch['mix_box'])
            labels = [(label_B, own_B), (before(label_B), 1 - own_B)]
        outputs, extra = apply(model, params, extra, preprocess(x), key, train)
        logits_BC, *aux = outputs if isinstance(outputs, tuple) else (outputs,)
        smoothing = label_smoothing if train else 0.0

        def over_labels(values: Callable[[jax.Array], jax.Array]) -> jax.Array:
            parts = [values(b) if s is None else s * values(b) for b, s in labels]
            return sum(parts[1:], parts[0])

        def cost(logits_BC: jax.Array) -> jax.Array:
            return over_labels(
                lambda label_B: losses.cross_entropy(logits_BC, label_B, label_smoothing=smoothing)
            )

        loss_B = cost(logits_BC)
        for aux_weight, aux_BC in zip(aux_weights, aux, strict=True) if train else ():
            loss_B = loss_B + aux_weight * cost(aux_BC)
        correct_B = over_labels(lambda label_B: losses.correct(logits_BC, label_B))
        weight_B = row_weight(batch, label_B.shape[0])
        weight = jnp.sum(weight_B)
        metrics = {
            'loss': (jnp.sum(loss_B * weight_B), weight),
            'accuracy': (jnp.sum(correct_B * weight_B), weight),
        }
        if not train:
            if len(class_names) > TOP_5_ABOVE:
                top_B = losses.correct_top_k(logits_BC, label_B, 5)
                metrics['top_5_accuracy'] = (jnp.sum(top_B * weight_B), weight)
            if len(class_names) <= MATRIX_UP_TO:
                confusion_CC = losses.confusion(logits_BC, label_B, weight_B)
                metrics['confusion'] = (confusion_CC, jnp.ones(()))
        return metrics['loss'][0] / jnp.maximum(weight, 1.0), (extra, metrics)

    return Task(init, loss, unit, units_per_example, 3 * forward_flops, class_names)


def before(x: jax.Array) -> jax.Array:
    """Returns what the row before has, and the first row what the last one has."""
    return jnp.roll(x, 1, axis=0)


def mixed(
    image_BHWC: jax.Array, share_B: jax.Array, box_B4: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns each image mixed with the one before it, and which share of the label is its own.

    The batch is the whole one, over all devices and hosts; one row crosses from each device to the
    next. See `bigjax.data.mixing`.

    Args:
      image_BHWC: any dtype.
      share_B: share of the row's own image outside the rectangle, float32.
      box_B4: the rectangle that is the other image's: top, left, bottom, right; may be empty.

    Returns:
      float32 [B, H, W, C], and float32 [B]: the mean share of the row's own image over the pixels.
    """
    _, height, width, _ = image_BHWC.shape

    def between(low_B: jax.Array, high_B: jax.Array, side: int) -> jax.Array:
        place_1S = jnp.arange(side)[None]
        return (low_B[:, None] <= place_1S) & (place_1S < high_B[:, None])

    top_B, left_B, bottom_B, right_B = box_B4.T
    inside_BHW = (
        between(top_B, bottom_B, height)[:, :, None] & between(left_B, right_B, width)[:, None]
    )
    share_BHW = jnp.where(inside_BHW, 0.0, share_B[:, None, None])
    own, other = image_BHWC.astype(jnp.float32), before(image_BHWC).astype(jnp.float32)
    image_BHWC = other + share_BHW[..., None] * (own - other)
    area_B = (bottom_B - top_B) * (right_B - left_B)
    return image_BHWC, share_B * (1 - area_B / (height * width))
