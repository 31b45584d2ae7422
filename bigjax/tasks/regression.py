"""Regression: predicting a quantity."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bigjax import losses
from bigjax.task import Task, apply, row_weight


def regression(model: nn.Module, *, features: int, forward_flops: int) -> Task:
    """Returns the task of predicting the number `batch['target']` from `batch['features']`.

    The loss is the mean squared error; evaluation adds the mean absolute error.
    """

    def init(key: jax.Array) -> dict[str, Any]:
        return dict(model.init(key, jnp.zeros((1, features)), train=False))

    def loss(params, extra, batch, key, train):
        prediction_B1, extra = apply(model, params, extra, batch['features'], key, train)
        target_B = batch['target']
        weight_B = row_weight(batch, target_B.shape[0])
        error_B = losses.squared_error(prediction_B1[:, 0], target_B)
        weight = jnp.sum(weight_B)
        metrics = {'loss': (jnp.sum(error_B * weight_B), weight)}
        if not train:
            absolute_B = jnp.abs(prediction_B1[:, 0].astype(jnp.float32) - target_B)
            metrics['absolute_error'] = (jnp.sum(absolute_B * weight_B), weight)
        return metrics['loss'][0] / jnp.maximum(weight, 1.0), (extra, metrics)

    return Task(init, loss, 'rows', 1, 3 * forward_flops)
