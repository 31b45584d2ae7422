"""Extractive question answering: where in a text the answer to a question stands."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bigjax import losses
from bigjax.task import Task, apply, row_weight

# Finite, so that a difference of two of them is no NaN.
NEVER = -1e9


def question_answering(model: nn.Module, *, length: int, longest: int, forward_flops: int) -> Task:
    """Returns the task of predicting `batch['start']` and `batch['end']` [B], the answer's tokens.

    Where the row's part of the text does not hold the answer, both are 0, the first position.
    The loss is the mean of both cross entropies (Devlin et al. 2019, §4.2). `predict` gives 'start'
    and 'end' int32 [B], the likeliest span of at most `longest` tokens in the text; its 'score'
    float32 [B], the sum of both logits; and 'none' [B], that of the first position.

    Args:
      model: called with tokens int32 [B, T] (negative = padding) and `train`; gives [B, T, 2].
      length: T, tokens of an example; `batch['text']` [B, 2] tells the first of them that belongs
        to the text, and the first after it.
      longest: tokens of the longest answer that is given.
      forward_flops: closed-form operations of one example's forward pass.
    """

    def init(key: jax.Array) -> dict[str, Any]:
        return dict(model.init(key, jnp.zeros((1, length), jnp.int32), train=False))

    def logits(params, extra, batch, key, train):
        logits_BT2, _ = apply(model, params, extra, batch['tokens'], key, train)
        logits_BT2 = jnp.where((batch['tokens'] >= 0)[..., None], logits_BT2, NEVER)
        return logits_BT2[..., 0], logits_BT2[..., 1]

    def loss(params, extra, batch, key, train):
        start_BT, end_BT = logits(params, extra, batch, key, train)
        weight_B = row_weight(batch, start_BT.shape[0])
        loss_B = losses.cross_entropy(start_BT, batch['start']) / 2
        loss_B += losses.cross_entropy(end_BT, batch['end']) / 2
        right_B = losses.correct(start_BT, batch['start']) * losses.correct(end_BT, batch['end'])
        rows = jnp.sum(weight_B)
        metrics = {
            'loss': (jnp.sum(loss_B * weight_B), rows),
            'accuracy': (jnp.sum(right_B * weight_B), rows),
        }
        return metrics['loss'][0] / jnp.maximum(rows, 1.0), (extra, metrics)

    def predict(params, extra, batch):
        start_BT, end_BT = logits(params, extra, batch, jax.random.key(0), False)
        start_B, end_B, score_B = best_span(start_BT, end_BT, batch['text'], longest=longest)
        none_B = start_BT[:, 0] + end_BT[:, 0]
        return {'start': start_B, 'end': end_B, 'score': score_B, 'none': none_B}

    return Task(init, loss, 'tokens', length, 3 * forward_flops, predict=predict)


def best_span(
    start_BT: jax.Array, end_BT: jax.Array, text_B2: jax.Array, *, longest: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns first and last token int32 [B] and score float32 [B] of the likeliest span.

    Args:
      start_BT: logit of each token being the first.
      end_BT: logit of each token being the last.
      text_B2: the first token that a span may have, and the first after all that it may have.
      longest: tokens of the longest span.
    """
    T = start_BT.shape[1]
    t_T = jnp.arange(T)
    inside_BT = (t_T[None] >= text_B2[:, :1]) & (t_T[None] < text_B2[:, 1:])
    start_BT = jnp.where(inside_BT, start_BT.astype(jnp.float32), NEVER)
    end_BT = jnp.where(inside_BT, end_BT.astype(jnp.float32), NEVER)
    ahead_TT = t_T[None] - t_T[:, None]
    fits_TT = (ahead_TT >= 0) & (ahead_TT < longest)
    score_BTT = jnp.where(fits_TT[None], start_BT[:, :, None] + end_BT[:, None], 2 * NEVER)
    best_B = jnp.argmax(score_BTT.reshape(-1, T * T), -1)
    score_B = jnp.max(score_BTT, (1, 2))
    return (best_B // T).astype(jnp.int32), (best_B % T).astype(jnp.int32), score_B
