"""Task: a model made trainable.

The tasks themselves are in `bigjax.tasks`, the only place where a model meets the keys of a batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

Batch = dict[str, jax.Array]
Metrics = dict[str, tuple[jax.Array, jax.Array]]


class Decoder(NamedTuple):
    """How a language model is run token by token.

    Attributes:
      init_cache: batch rows -> an empty key-value cache.
      step: (params, tokens_BT, cache) -> (logits_BTV, cache) for the next T positions.
      max_length: positions the model can hold.
    """

    init_cache: Callable[[int], Any]
    step: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]
    max_length: int


class Task(NamedTuple):
    """A pair of pure functions, and what a report says of them.

    Attributes:
      init: key -> `{'params': …, **extra}`; extra holds BatchNorm statistics and the like.
      loss: (params, extra, batch, key, train) -> (scalar, (extra, {name: (sum, weight)})).
      unit: what one example is counted in, `'tokens'`, `'images'`, ….
      units_per_example: how many of them an example has.
      flops_per_example: closed-form floating-point operations of one example's training step.
      class_names: names of the classes where there are classes.
      decoder: how to generate, for language models.
      predict: (params, extra, batch) -> `{name: array}`, each with the rows of the batch in front:
        what `Experiment.score` scores, where a score is no sum over rows (BLEU, span F1).
      splits_positions: whether the loss can be computed in the order of `bigjax.nn.context`.
    """

    init: Callable[[jax.Array], dict[str, Any]]
    loss: Callable[..., tuple[jax.Array, tuple[dict[str, Any], Metrics]]]
    unit: str
    units_per_example: int
    flops_per_example: int
    class_names: tuple[str, ...] = ()
    decoder: Decoder | None = None
    predict: Callable[[Any, Any, Batch], dict[str, jax.Array]] | None = None
    splits_positions: bool = False


def apply(
    model: nn.Module, params: Any, extra: Any, inputs: jax.Array, key: jax.Array, train: bool
) -> tuple[jax.Array, dict[str, Any]]:
    """Runs a model; in training, what it keeps beside its parameters is updated."""
    outputs, updated = model.apply(
        {'params': params, **extra},
        inputs,
        train=train,
        rngs={'dropout': key},
        mutable=list(extra) if train else [],
    )
    return outputs, {**extra, **updated}


def row_weight(batch: Batch, rows: int) -> jax.Array:
    """Weight of each row: evaluation marks its padding with 0, training has none."""
    return batch.get('weight', jnp.ones((rows,), jnp.float32))
