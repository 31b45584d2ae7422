"""Dense: a linear map over the trailing dimensions of its input.

Legend: N rows (all leading dimensions flattened), I inputs, O outputs, C width,
V vocabulary.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bigjax.nn.constrain import constrain, parts
from bigjax.nn.rows import rows
from bigjax.strategy import Matmul


class Dense(nn.Module):
    """Linear map `x @ kernel + bias` over the last `in_dims` dimensions of `x`.

    The kernel keeps one dimension per input and output dimension, `(*x.shape[-in_dims:],
    *features)`, so that a sharding rule can name each of them (heads, say). The product itself is
    taken on flattened matrices, because XLA's CPU backend has a slow gradient for dense layers on
    three-dimensional input; accelerators compile both forms to the same matrix product. On a mesh
    the leading dimensions stay, see `bigjax.nn.rows`.

    Input [..., *inputs], float or int; output [..., *features] in `dtype`; parameters in
    `param_dtype`.

    Attributes:
      features: output size, or several for an output with several dimensions, as (heads, 3, 64).
      in_dims: how many trailing dimensions of the input are contracted.
      use_bias: adds a bias of shape `features`.
      dtype: type of the computation and the output; None takes the input's.
      param_dtype: type of the parameters.
      kernel_init: initializer, called with the flattened shape (inputs, outputs).
      bias_init: initializer of the bias.
      matmul: precision of the product: 'default' is `dtype`; see `bigjax.nn.quantized`.
      reads: name in `bigjax.sharding.ACTIVATIONS` of the first input dimension where a mesh splits
        it, so that the output is a sum over devices: 'heads', 'mlp'. The outputs are 'embed' then.
      joined: no gradient reaches the input from the product: `bigjax.nn.together` adds it.
    """

    features: int | tuple[int, ...]
    in_dims: int = 1
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable[..., jax.Array] = nn.initializers.lecun_normal()
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros_init()
    matmul: Matmul = 'default'
    reads: str | None = None
    joined: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        if not 1 <= self.in_dims <= x.ndim:
            raise ValueError(f'in_dims={self.in_dims}: the input has {x.ndim} dimensions')
        lead, inputs = x.shape[: -self.in_dims], x.shape[-self.in_dims :]
        flat = math.prod(inputs), math.prod(features)

        def init_kernel(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            return self.kernel_init(key, flat, dtype).reshape(shape)

        kernel = self.param('kernel', init_kernel, (*inputs, *features), self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param('bias', self.bias_init, features, self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        x = x.reshape(*rows(lead), flat[0])
        if self.joined:
            x = jax.lax.stop_gradient(x)
        told = _is_scattered(lead, inputs[0], self.reads) or _is_odd(flat[1])
        if self.reads and told and self.matmul == 'default':
            y = _product_of_parts(x, kernel, self.reads)
        else:
            y = _product(x, kernel.reshape(flat), self.matmul)
        if bias is not None:
            y += bias.reshape(*(1,) * (y.ndim - 1), flat[1])
        # The name is for `bigjax.nn.remat`.
        return checkpoint_name(y.reshape(*lead, *features), self.name or 'dense')


def _product(x: jax.Array, w_IO: jax.Array, matmul: Matmul) -> jax.Array:
    """No method of `Dense`: adapters (`bigjax.lora`) are added around each of its methods."""
    if matmul == 'default':
        return x @ w_IO
    # Not above: its library is slow to import, and few runs need it.
    from bigjax.nn.quantized import quantized_matmul

    return quantized_matmul(x, w_IO, matmul)


def _is_scattered(lead: tuple[int, ...], size: int, reads: str | None) -> bool:
    """Returns whether devices split both the inputs and, within a block, the positions."""
    if reads is None or len(lead) < 2:
        return False
    return parts(reads, size) > 1 and parts('length', lead[1]) > 1


def _is_odd(outputs: int) -> bool:
    """Returns whether FSDP splits the outputs into parts of an odd number of times 128.

    That is the one size that libtpu 0.0.52 scatters no sum into along the last dimension: it sums
    the whole on every device. Along the first one it does.
    """
    each = parts('embed', outputs)
    return each > 1 and outputs // each % 256 == 128


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product_of_parts(x: jax.Array, kernel: jax.Array, reads: str) -> jax.Array:
    """Returns x [..., I] times a kernel of which a device holds rows, these at their whole width.

    Left to itself the compiler gathers all positions of `x` instead, where FSDP splits the width
    and a context axis the positions, and every device computes what another does too. For the
    gradient of `x` the kernel is gathered once more, not kept; its own is scattered (`_is_odd`).
    """
    return _product_forward(x, kernel, reads)[0]


def _product_forward(x: jax.Array, kernel: jax.Array, reads: str):
    # The product itself, not a call of what it is the forward pass of: `bigjax.nn.remat` would not
    # see that it is one.
    return x @ _whole(kernel, reads, x.shape[-1]), (x, kernel)


def _product_backward(reads: str, residuals: tuple[jax.Array, jax.Array], g: jax.Array):
    x, kernel = residuals
    if _is_odd(g.shape[-1]):
        dw_OI = jnp.einsum('...o,...i->oi', g, x)
        dw_IO = constrain(dw_OI, 'embed', reads).T
    else:
        dw_IO = jnp.einsum('...i,...o->io', x, g)
    return g @ _whole(kernel, reads, x.shape[-1]).T, dw_IO.reshape(kernel.shape)


_product_of_parts.defvjp(_product_forward, _product_backward)


def _whole(kernel: jax.Array, reads: str, inputs: int) -> jax.Array:
    return constrain(kernel, reads, *[None] * (kernel.ndim - 1)).reshape(inputs, -1)


def embedding_logits(
    x: jax.Array, embedding_VC: jax.Array, bias_V: jax.Array | None = None
) -> jax.Array:
    """Returns float32 logits [..., V]: products of `x` [..., C] with the rows of an embedding.

    The product is taken in the type of `x`, and on matrices, as in `Dense`; then comes the bias.
    """
    merged, embedding_VC = _gradients_at_once(
        x.reshape(*rows(x.shape[:-1]), x.shape[-1]), embedding_VC.astype(x.dtype)
    )
    logits = jax.lax.dot_general(
        merged,
        embedding_VC,
        (((merged.ndim - 1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    if bias_V is not None:
        logits += bias_V.reshape(*(1,) * (logits.ndim - 1), -1)
    return logits.reshape(*x.shape[:-1], embedding_VC.shape[0])


@jax.custom_vjp
def _gradients_at_once(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns both; of what is computed from them the gradients are made one after the other.

    Else XLA may leave that of `w` until the end, and keep float32 logits through all layers for it.
    """
    return x, w


_gradients_at_once.defvjp(lambda x, w: ((x, w), None), lambda _, g: jax.lax.optimization_barrier(g))
