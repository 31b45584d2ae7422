"""Translation: predicting each token of a target from a source and the tokens before it.

Legend: B batch, S source tokens, T target tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bigjax import losses
from bigjax.beam import Found, beam_search, greedy_search
from bigjax.run import Search
from bigjax.task import Task, row_weight

# (params, source_BS, real_B) -> the texts found.
Translate = Callable[[Any, jax.Array, jax.Array], Found]


def translation(
    model: nn.Module,
    *,
    length: int,
    begin: int,
    end: int,
    token_bytes_V: jax.typing.ArrayLike,
    forward_flops: int,
    label_smoothing: float = 0.0,
    search: Search,
) -> Task:
    """Returns the task of predicting `batch['target']` [B, T] from `batch['source']` [B, S].

    Args:
      model: called with source int32 [B, S], the target moved one place [B, T] and `train`, gives
        logits [B, T, V]; decodes by the methods that `make_search` names.
      length: S and T, negative tokens being padding in both.
      begin: the token that targets are decoded from.
      end: the token that ends them.
      token_bytes_V: bytes each token stands for, so that loss can be told in bits per byte.
      forward_flops: closed-form operations of one example's forward pass.
      label_smoothing: probability mass spread over all tokens in training.
      search: how predictions are searched for.
    """
    find = make_search(model, length=length, begin=begin, end=end, search=search)

    def init(key: jax.Array) -> dict[str, Any]:
        nothing_1T = jnp.zeros((1, length), jnp.int32)
        return dict(model.init(key, nothing_1T, nothing_1T, train=False))

    def loss(params, extra, batch, key, train):
        real_B1 = row_weight(batch, batch['target'].shape[0])[:, None] > 0
        target_BT = jnp.where(real_B1, batch['target'], -1)
        before_BT = jnp.roll(target_BT, 1, axis=1).at[:, 0].set(begin)
        logits_BTV = model.apply(
            {'params': params}, batch['source'], before_BT, train=train, rngs={'dropout': key}
        )
        nats_BT = losses.cross_entropy(
            logits_BTV, target_BT, label_smoothing=label_smoothing if train else 0.0
        )
        nats = jnp.sum(nats_BT)
        valid_BT = (target_BT >= 0).astype(jnp.float32)
        weight = jnp.sum(valid_BT)
        metrics = {'loss': (nats, weight)}
        if not train:
            byte_counts = jnp.asarray(token_bytes_V, jnp.float32)[jnp.maximum(target_BT, 0)]
            metrics['bits_per_byte'] = (nats / jnp.log(2.0), jnp.sum(byte_counts * valid_BT))
        return nats / jnp.maximum(weight, 1.0), (extra, metrics)

    def predict(params, extra, batch):
        del extra
        real_B = row_weight(batch, batch['source'].shape[0]) > 0
        return {'tokens': find(params, batch['source'], real_B).tokens_BT}

    return Task(init, loss, 'tokens', 2 * length, 3 * forward_flops, predict=predict)


def make_search(
    model: nn.Module, *, length: int, begin: int, end: int, search: Search
) -> Translate:
    """Returns the pure function that finds the target of each source.

    Args:
      model: has `start(source_BS) -> memory`, `init_cache(rows, length)`, `cache_axis`, and
        `decode(token_N, position, cache, memory) -> (logits_NV, cache)`.
      length: most tokens of a target, the end included.
      begin: the token that targets are decoded from.
      end: the token that ends them.
      search: beams and length penalty.
    """

    def find(params: Any, source_BS: jax.Array, real_B: jax.Array) -> Found:
        variables = {'params': params}
        memory = model.apply(variables, source_BS, method='start')

        def step(token_N, position, cache):
            return model.apply(variables, token_N, position, cache, memory, method='decode')

        rows = source_BS.shape[0]
        options: dict[str, Any] = {'rows': rows, 'max_length': length, 'begin': begin}
        options |= {'end': end, 'alpha': search.length_penalty, 'real_B': real_B}
        cache = model.apply(variables, rows * search.beam, length, memory, method='init_cache')
        if search.beam == 1:
            return greedy_search(step, cache, **options)
        return beam_search(step, cache, beam=search.beam, cache_axis=model.cache_axis, **options)

    return find
