"""Dense layers that read one input: the gradient of that input as one product.

Where a mesh splits the outputs of such layers, the gradient of their input is a sum over the
devices that share these outputs. Layer by layer every term would be summed over the mesh before
they are added up; here one sum is, of all (Korthikanti et al. 2022, arXiv:2205.05198, §4.2.2).

Legend: ... rows (any leading dimensions), I inputs, S parts that outputs are split into, P outputs
of one part.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bigjax.nn.constrain import constrain, parts
from bigjax.nn.linear import Dense

Features = int | tuple[int, ...]


def together(
    dense: functools.partial[Dense], x: jax.Array, split: str, features: Mapping[str, Features]
) -> list[jax.Array]:
    """Returns what several layers make of one input; the same as each of them called by itself.

    Called in a compact method, whose children the layers are. Only on a mesh that splits outputs is
    anything else done, and only for gradients; quantized layers, which scale each output gradient
    by itself, stay as they are.

    Args:
      dense: makes a layer, given its features and its name; without a bias or with it.
      x: [..., I], what they all read.
      split: name in `bigjax.sharding.ACTIVATIONS` of their first output dimension.
      features: of each layer, by its name.

    Returns:
      Outputs [..., *features] in order.
    """
    sizes = [size if isinstance(size, int) else size[0] for size in features.values()]
    shards = parts(split, math.gcd(*sizes))
    joined = shards > 1 and dense.keywords.get('matmul', 'default') == 'default'
    layers = [dense(size, name=name, joined=joined) for name, size in features.items()]
    outputs = [layer(x) for layer in layers]
    if not joined:
        return outputs
    kernels: list[jax.Array] = [layer.get_variable('params', 'kernel') for layer in layers]
    return _joined(x, outputs, kernels, split, shards)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _joined(
    x: jax.Array, outputs: list[jax.Array], kernels: list[jax.Array], split: str, shards: int
) -> list[jax.Array]:
    """Returns the outputs, which so far have no gradient to `x`."""
    return outputs


def _forward(
    x: jax.Array, outputs: list[jax.Array], kernels: list[jax.Array], split: str, shards: int
):
    empty = jnp.zeros((0,), x.dtype)  # Tells the type.
    return outputs, (empty, [w.astype(y.dtype) for w, y in zip(kernels, outputs, strict=True)])


def _backward(split: str, shards: int, residuals: Any, gradients: list[jax.Array]):
    empty, kernels = residuals
    lead = gradients[0].shape[: 1 - kernels[0].ndim]
    # Gathered as the layers gather them, or what a layer computes again would be gathered twice.
    kernels = [constrain(w, None, split, *[None] * (w.ndim - 2)) for w in kernels]
    # Side by side within each device's part: nothing moves for it.
    g = jnp.concatenate([g.reshape(*lead, shards, -1) for g in gradients], axis=-1)
    w_ISP = jnp.concatenate([w.reshape(w.shape[0], shards, -1) for w in kernels], axis=-1)
    dx = jnp.einsum('...sp,isp->...i', g, w_ISP)
    return dx.astype(empty.dtype), gradients, [None] * len(kernels)


_joined.defvjp(_forward, _backward)
