"""Classification: predicting one label of an example."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bigjax import losses
from bigjax.task import Task, apply, row_weight


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
) -> Task:
    """Returns the task of predicting `batch['label']` from `batch[inputs]`.

    Args:
      model: called with inputs [B, …] and `train`; gives logits [B, C].
      inputs: key of the batch that the model reads.
      example: shape and dtype of one example, without the batch axis.
      class_names: names of the C classes.
      forward_flops: closed-form operations of one example's forward pass.
      unit: what rates are counted in.
      units_per_example: how many units one example has.
      label_smoothing: probability mass spread over all classes in training.
      preprocess: applied to the inputs on the device, before the model.
    """

    def init(key: jax.Array) -> dict[str, Any]:
        inputs = preprocess(jnp.zeros((1, *example.shape), example.dtype))
        return dict(model.init(key, inputs, train=False))

    def loss(params, extra, batch, key, train):
        logits_BC, extra = apply(model, params, extra, preprocess(batch[inputs]), key, train)
        label_B = batch['label']
        weight_B = row_weight(batch, label_B.shape[0])
        loss_B = losses.cross_entropy(
            logits_BC, label_B, label_smoothing=label_smoothing if train else 0.0
        )
        correct_B = (jnp.argmax(logits_BC, -1) == label_B).astype(jnp.float32)
        weight = jnp.sum(weight_B)
        metrics = {
            'loss': (jnp.sum(loss_B * weight_B), weight),
            'accuracy': (jnp.sum(correct_B * weight_B), weight),
        }
        if not train:
            confusion_CC = losses.confusion(logits_BC, label_B, weight_B)
            metrics['confusion'] = (confusion_CC, jnp.ones(()))
        return metrics['loss'][0] / jnp.maximum(weight, 1.0), (extra, metrics)

    return Task(init, loss, unit, units_per_example, 3 * forward_flops, class_names)
