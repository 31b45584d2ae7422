"""Language modelling: predicting each token from those before it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bigjax import losses
from bigjax.nn.constrain import constrain
from bigjax.nn.context import laid_out
from bigjax.nn.moe import sown
from bigjax.task import Decoder, Task


def causal_lm(
    model: nn.Module,
    *,
    length: int,
    token_bytes_V: jax.typing.ArrayLike,
    forward_flops: int,
    decoder: Decoder,
    z_loss: float = 0.0,
) -> Task:
    """Returns the task of predicting each of `batch['tokens']` [B, T + 1] from those before it.

    What layers sow in the collections 'losses' and 'metrics' in training (mixtures of experts do)
    joins the loss and the metrics.

    Args:
      model: called with tokens int32 [B, T] and `train`; gives logits [B, T, V].
      length: T, tokens predicted per example.
      token_bytes_V: bytes each token stands for, so that loss can be told in bits per byte.
      forward_flops: closed-form operations of one example's forward pass.
      decoder: how the same model generates.
      z_loss: weight of the squared log-partition (PaLM, §5) in training.
    """

    def init(key: jax.Array) -> dict[str, Any]:
        return dict(model.init(key, jnp.zeros((1, length), jnp.int32), train=False))

    def loss(params, extra, batch, key, train):
        tokens_BT, targets_BT = _placed(batch['tokens'][:, :-1]), _placed(batch['tokens'][:, 1:])
        logits_BTV, updated = model.apply(
            {'params': params, **extra},
            jnp.maximum(tokens_BT, 0),
            train=train,
            rngs={'dropout': key},
            mutable=[*extra, 'losses', 'metrics'] if train else [],
        )
        extra = {name: updated.get(name, value) for name, value in extra.items()}
        sown_loss, sown_metrics = sown(updated)
        # A negative token is padding: cross_entropy gives it no loss, here it gets no weight.
        real_BT = targets_BT >= 0
        nats = jnp.sum(
            losses.cross_entropy(logits_BTV, targets_BT, z_loss=z_loss if train else 0.0)
        )
        weight = jnp.sum(real_BT.astype(jnp.float32))
        metrics = {'loss': (nats, weight), **sown_metrics}
        if not train:
            byte_counts = jnp.asarray(token_bytes_V, jnp.float32)[jnp.maximum(targets_BT, 0)]
            metrics['bits_per_byte'] = (nats / jnp.log(2.0), jnp.sum(byte_counts * real_BT))
        return nats / jnp.maximum(weight, 1.0) + sown_loss, (extra, metrics)

    # A model that says how it sees positions on other devices takes them in any order.
    splits = hasattr(model, 'context')
    return Task(
        init, loss, 'tokens', length, 3 * forward_flops, decoder=decoder, splits_positions=splits
    )


def _placed(tokens_BT: jax.Array) -> jax.Array:
    """Returns tokens or targets in the order in which positions lie on the mesh.

    The loss is a sum over positions, and has none.
    """
    return constrain(laid_out(tokens_BT), 'batch', 'length')


def cached_decoder(model: Any, max_length: int, tokens: int | None = None) -> Decoder:
    """Returns how a model with `init_cache` and `decode` generates.

    Args:
      model: a language model such as `bigjax.models.gpt.GPT`.
      max_length: positions it can hold.
      tokens: how many the tokenizer knows, where the model has more: the others are never drawn.
    """

    def step(params: Any, tokens_BT: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        variables = {'params': params}
        logits_BTV, cache = model.apply(variables, tokens_BT, cache, method='decode')
        return logits_BTV[..., :tokens], cache

    return Decoder(model.init_cache, step, max_length)
