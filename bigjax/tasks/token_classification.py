"""Token classification: predicting a label of every word of a text."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bigjax import losses
from bigjax.task import Task, apply, row_weight


def token_classification(model: nn.Module, *, length: int, forward_flops: int) -> Task:
    """Returns the task of predicting `batch['labels']` [B, T], negative where there is none.

    `predict` gives 'labels' int32 [B, T], the likeliest of each token.

    Args:
      model: called with tokens int32 [B, T] (negative = padding) and `train`; gives [B, T, C].
      length: T, tokens of an example.
      forward_flops: closed-form operations of one example's forward pass.
    """

    def init(key: jax.Array) -> dict[str, Any]:
        return dict(model.init(key, jnp.zeros((1, length), jnp.int32), train=False))

    def loss(params, extra, batch, key, train):
        logits_BTC, extra = apply(model, params, extra, batch['tokens'], key, train)
        labels_BT = batch['labels']
        weight_B = row_weight(batch, labels_BT.shape[0])
        weight_BT = (labels_BT >= 0) * weight_B[:, None]
        loss_BT = losses.cross_entropy(logits_BTC, labels_BT) * weight_BT
        right_BT = losses.correct(logits_BTC, labels_BT) * weight_BT
        count = jnp.sum(weight_BT)
        metrics = {'loss': (jnp.sum(loss_BT), count), 'accuracy': (jnp.sum(right_BT), count)}
        return metrics['loss'][0] / jnp.maximum(count, 1.0), (extra, metrics)

    def predict(params, extra, batch):
        logits_BTC, _ = apply(model, params, extra, batch['tokens'], jax.random.key(0), False)
        return {'labels': jnp.argmax(logits_BTC, -1).astype(jnp.int32)}

    return Task(init, loss, 'tokens', length, 3 * forward_flops, predict=predict)
