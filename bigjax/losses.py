"""Losses and counts as pure functions of logits and labels; per example, float32.

Shapes: ... = any leading dimensions, C = classes, N = the leading dimensions flattened.
"""

import jax
import jax.numpy as jnp
import numpy as np


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> jax.Array:
    """Softmax cross entropy against integer labels, in nats.

    Label smoothing s trains towards (1 - s) one_hot + s / C (Szegedy et al. 2016, §7). z_loss adds
    z_loss * log(Z)², which keeps the softmax normaliser near 1 (Chowdhery et al. 2022, §5).

    Args:
        logits: [..., C], any float dtype; computed in float32.
        labels: [...] integers below C; a negative one means "no label here".
        label_smoothing: s above, 0 to 1.
        z_loss: factor of the squared log normaliser.

    Returns:
        [...] float32, exactly 0 (and with zero gradient) where the label is negative.
    """
    logits = logits.astype(jnp.float32)
    valid = labels >= 0
    index = jnp.maximum(labels, 0)[..., None]
    peak = jax.lax.stop_gradient(logits.max(axis=-1))
    total = jnp.exp(logits - peak[..., None]).sum(axis=-1)
    # Gathered before, not after, the maximum is taken off: the shifted logits are never stored. And
    # gathered before the gradient, which needs the sum: else logits may be kept until the end.
    own = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
    total, own = jax.lax.optimization_barrier((total, own))
    log_sum = jnp.log(total)
    loss = log_sum - (own - peak)
    if label_smoothing:
        uniform = log_sum - (logits.mean(axis=-1) - peak)
        loss = (1 - label_smoothing) * loss + label_smoothing * uniform
    if z_loss:
        loss = loss + z_loss * jnp.square(log_sum + peak)
    return jnp.where(valid, loss, 0.0)


def squared_error(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    """(prediction - target)², float32; shapes must be equal.

    Raises:
        ValueError: where the shapes differ, since [B, 1] against [B] would broadcast to [B, B].
    """
    if predictions.shape != targets.shape:
        raise ValueError(f'predictions {predictions.shape} and targets {targets.shape} differ')
    return jnp.square(predictions.astype(jnp.float32) - targets.astype(jnp.float32))


def correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """1.0 where the largest logit is the label's, else 0.0 (also for a negative label); float32."""
    return (logits.argmax(axis=-1) == labels).astype(jnp.float32)


def correct_top_k(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """1.0 where fewer than k logits are larger than the label's, else 0.0; float32 [...]."""
    own = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)
    above = (logits > own).sum(axis=-1)
    return ((above < k) & (labels >= 0)).astype(jnp.float32)


def confusion(logits: jax.Array, labels: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Confusion matrix: entry [t, p] sums the weights of examples of class t predicted as p.

    Sums over batches and devices by addition. Exact: every product is of ones and weights, and
    float32 counts up to 2²⁴ per call.

    Args:
        logits: [..., C].
        labels: [...] integers; examples with a negative label are left out.
        weights: [...] float32, 1 for a real example and 0 for padding; None = all 1.

    Returns:
        [C, C] float32.
    """
    classes = logits.shape[-1]
    truth_NC = jax.nn.one_hot(labels.reshape(-1), classes, dtype=jnp.float32)
    guess_NC = jax.nn.one_hot(logits.argmax(axis=-1).reshape(-1), classes, dtype=jnp.float32)
    if weights is not None:
        truth_NC = truth_NC * weights.reshape(-1)[:, None]
    return jnp.matmul(truth_NC.T, guess_NC, precision=jax.lax.Precision.HIGHEST)


def macro_f1(confusion_CC: np.ndarray) -> np.ndarray:
    """Mean over classes of F1 = 2 right / (truths + predictions), without those that never occur.

    Args:
        confusion_CC: [C, C] counts, row = truth, column = prediction.

    Returns:
        A float64 number, 0 where nothing was counted.
    """
    counts_C = confusion_CC.sum(0) + confusion_CC.sum(1)
    f1_C = 2 * np.diagonal(confusion_CC)[counts_C > 0] / counts_C[counts_C > 0]
    return np.asarray(f1_C.mean() if f1_C.size else 0.0)
