"""Masked language modelling: what hidden tokens were; and whether one text follows another."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bigjax import losses
from bigjax.task import Task, row_weight


def masked_lm(model: nn.Module, *, length: int, predictions: int, forward_flops: int) -> Task:
    """Returns the task of predicting `batch['targets']` [B, P] at `batch['positions']` [B, P].

    A negative target is none. Where the batch has 'random' [B], 1 for a row whose second text does
    not follow its first, that is predicted, too, and its loss is added (Devlin et al. 2019, §3.1).

    Args:
      model: called with tokens int32 [B, T] (negative = padding), positions int32 [B, P] and
        `train`; gives logits [B, P, V] and, for the next sentence, [B, 2] or None.
      length: T, tokens of an example.
      predictions: P, tokens predicted at most.
      forward_flops: closed-form operations of one example's forward pass.
    """

    def init(key: jax.Array) -> dict[str, Any]:
        tokens_BT = jnp.zeros((1, length), jnp.int32)
        positions_BP = jnp.zeros((1, predictions), jnp.int32)
        return dict(model.init(key, tokens_BT, positions_BP, train=False))

    def loss(params, extra, batch, key, train):
        targets_BP = batch['targets']
        logits_BPV, next_B2 = model.apply(
            {'params': params, **extra},
            batch['tokens'],
            batch['positions'],
            train=train,
            rngs={'dropout': key},
        )
        weight_B = row_weight(batch, targets_BP.shape[0])
        weight_BP = (targets_BP >= 0) * weight_B[:, None]
        loss_BP = losses.cross_entropy(logits_BPV, targets_BP) * weight_BP
        count = jnp.sum(weight_BP)
        right_BP = losses.correct(logits_BPV, targets_BP) * weight_BP
        metrics = {'loss': (jnp.sum(loss_BP), count), 'accuracy': (jnp.sum(right_BP), count)}
        total = metrics['loss'][0] / jnp.maximum(count, 1.0)
        if next_B2 is not None:
            rows = jnp.sum(weight_B)
            loss_B = losses.cross_entropy(next_B2, batch['random']) * weight_B
            right_B = losses.correct(next_B2, batch['random']) * weight_B
            metrics['next_loss'] = (jnp.sum(loss_B), rows)
            metrics['next_accuracy'] = (jnp.sum(right_B), rows)
            total += metrics['next_loss'][0] / jnp.maximum(rows, 1.0)
        return total, (extra, metrics)

    return Task(init, loss, 'tokens', length, 3 * forward_flops)
