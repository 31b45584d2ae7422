"""Logits of a vocabulary, made where its table lies on the mesh, and the gradient of the table.

What devices send each other for that gradient is written out here: where it was left to the
compiler, it summed it whole, or in float32 along rows, which it then gathered to split columns.

Legend: B batch, T positions, C width, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp

from bigjax.nn.constrain import axes, constrain, enter, on_each
from bigjax.nn.linear import embedding_logits

Names = tuple[str | None, ...]


def logits(x_BTC: jax.Array, embedding_VC: jax.Array) -> jax.Array:
    """Returns float32 logits [B, T, V] of the last layer's output, normalised.

    Devices that cannot share the vocabulary share positions. The table is gathered along C in the
    type of `x_BTC`, and its gradient summed in that type, each device its part of C.
    """
    shared = axes('vocab', embedding_VC.shape[0])
    names = ('examples', 'length', 'vocab') if shared else ('examples', 'sequence', None)
    x_BTC = enter(x_BTC, 'examples') if shared else constrain(x_BTC, *names[:2], None)
    table_VC = constrain(embedding_VC.astype(x_BTC.dtype), 'vocab', 'embed')
    width = axes('embed', table_VC.shape[1])
    if width and set(width) <= set(axes('examples', x_BTC.shape[0])):
        logits_BTV = _of_parts(x_BTC, table_VC, names)
    else:
        logits_BTV = embedding_logits(x_BTC, constrain(table_VC, 'vocab', None))
    return constrain(logits_BTV, *names)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _of_parts(x_BTC: jax.Array, table_VC: jax.Array, names: Names) -> jax.Array:
    """Returns the logits, placed by `names`, where the axes that split C split rows, too.

    Each device then has sums over its own rows, of which it keeps a part.
    """
    return _forward(x_BTC, table_VC, names)[0]


def _forward(x_BTC: jax.Array, table_VC: jax.Array, names: Names):
    whole_VC = constrain(table_VC, 'vocab', None)
    return embedding_logits(x_BTC, whole_VC), (x_BTC, whole_VC)


def _backward(names: Names, residuals: tuple[jax.Array, jax.Array], g_BTV: jax.Array):
    x_BTC, whole_VC = residuals
    g_BTV = g_BTV.astype(x_BTC.dtype)
    examples, positions, vocab = (
        axes(name, size) if name else () for name, size in zip(names, g_BTV.shape, strict=True)
    )
    width, given = axes('embed', x_BTC.shape[2]), axes('sequence', x_BTC.shape[1])
    rest = tuple(axis for axis in (*examples, *positions) if axis not in width)
    dx_BTC = jnp.einsum('btv,vc->btc', g_BTV, whole_VC, preferred_element_type=jnp.float32)
    dx_BTC = constrain(dx_BTC.astype(x_BTC.dtype), 'examples', 'sequence', None)

    def local(x_BTC: jax.Array, g_BTV: jax.Array, dx_BTC: jax.Array):
        sums_VC = jnp.einsum('btv,btc->vc', g_BTV, x_BTC, preferred_element_type=jnp.float32)
        # As in `embedding_logits`: else float32 logits may be kept until the end for this.
        dx_BTC, sums_VC = jax.lax.optimization_barrier((dx_BTC, sums_VC.astype(x_BTC.dtype)))
        sums_VC = jax.lax.psum_scatter(sums_VC, width, scatter_dimension=1, tiled=True)
        return dx_BTC, jax.lax.psum(sums_VC, rest) if rest else sums_VC

    dx = jax.P(examples, given)
    inputs = jax.P(examples, positions), jax.P(examples, positions, vocab), dx
    return on_each(local, inputs, (dx, jax.P(vocab, width)))(x_BTC, g_BTV, dx_BTC)


_of_parts.defvjp(_forward, _backward)
