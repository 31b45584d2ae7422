"""Task: a model made trainable. The only place where a model meets the keys of a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bigjax import losses

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
    """

    init: Callable[[jax.Array], dict[str, Any]]
    loss: Callable[..., tuple[jax.Array, tuple[dict[str, Any], Metrics]]]
    unit: str
    units_per_example: int
    flops_per_example: int
    class_names: tuple[str, ...] = ()
    decoder: Decoder | None = None


def _apply(
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


def _row_weight(batch: Batch, rows: int) -> jax.Array:
    """Weight of each row: evaluation marks its padding with 0, training has none."""
    return batch.get('weight', jnp.ones((rows,), jnp.float32))


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
        logits_BC, extra = _apply(model, params, extra, preprocess(batch[inputs]), key, train)
        label_B = batch['label']
        weight_B = _row_weight(batch, label_B.shape[0])
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


def regression(model: nn.Module, *, features: int, forward_flops: int) -> Task:
    """Returns the task of predicting the number `batch['target']` from `batch['features']`.

    The loss is the mean squared error; evaluation adds the mean absolute error.
    """

    def init(key: jax.Array) -> dict[str, Any]:
        return dict(model.init(key, jnp.zeros((1, features)), train=False))

    def loss(params, extra, batch, key, train):
        prediction_B1, extra = _apply(model, params, extra, batch['features'], key, train)
        target_B = batch['target']
        weight_B = _row_weight(batch, target_B.shape[0])
        error_B = losses.squared_error(prediction_B1[:, 0], target_B)
        weight = jnp.sum(weight_B)
        metrics = {'loss': (jnp.sum(error_B * weight_B), weight)}
        if not train:
            absolute_B = jnp.abs(prediction_B1[:, 0].astype(jnp.float32) - target_B)
            metrics['absolute_error'] = (jnp.sum(absolute_B * weight_B), weight)
        return metrics['loss'][0] / jnp.maximum(weight, 1.0), (extra, metrics)

    return Task(init, loss, 'rows', 1, 3 * forward_flops)


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
        tokens_BT, targets_BT = batch['tokens'][:, :-1], batch['tokens'][:, 1:]
        logits_BTV, extra = _apply(model, params, extra, jnp.maximum(tokens_BT, 0), key, train)
        # A negative token is padding: cross_entropy gives it no loss, here it gets no weight.
        real_BT = targets_BT >= 0
        nats = jnp.sum(
            losses.cross_entropy(logits_BTV, targets_BT, z_loss=z_loss if train else 0.0)
        )
        weight = jnp.sum(real_BT.astype(jnp.float32))
        metrics = {'loss': (nats, weight)}
        if not train:
            byte_counts = jnp.asarray(token_bytes_V, jnp.float32)[jnp.maximum(targets_BT, 0)]
            metrics['bits_per_byte'] = (nats / jnp.log(2.0), jnp.sum(byte_counts * real_BT))
        return nats / jnp.maximum(weight, 1.0), (extra, metrics)

    return Task(init, loss, 'tokens', length, 3 * forward_flops, decoder=decoder)
