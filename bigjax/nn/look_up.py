"""Rows of an embedding, looked up where they lie on the mesh, and the gradient of that.

What devices send each other is written out here: where it was left to the compiler, it laid tables
over other devices than those that hold them, and summed gradients whole that each needs a part of.

Legend: B batch, T positions, C width, V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigjax.nn.constrain import axes, constrain, mesh_is_large, on_each

Axes = tuple[str, ...]


def look_up(embedding_VC: jax.Array, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
    """Returns the rows [B, T, C] of tokens in `dtype`, placed as between blocks.

    The gradient sums in the table's type. On a mesh the table is gathered along C in `dtype` and
    stays split along V: a device looks up the rows that it has, and adds up the gradients of those.
    A token that is not in the vocabulary has a row of NaN where no device splits V, else of zeros.
    """
    if not mesh_is_large():
        return jnp.take(embedding_VC, tokens_BT, axis=0).astype(dtype)
    return _rows(embedding_VC, tokens_BT, jnp.dtype(dtype))


class _Places(NamedTuple):
    """Mesh axes that split each dimension: of the table, of the tokens, and of what is looked up.

    Attributes:
      vocab: of V.
      width: of C, in the table.
      batch: of B.
      read: of T, where tokens are looked up.
      given: of T, in the result: `read`, and those of `vocab` that divide what is left.
    """

    vocab: Axes
    width: Axes
    batch: Axes
    read: Axes
    given: Axes

    @property
    def table(self) -> jax.P:
        return jax.P(self.vocab, self.width)

    @property
    def tokens(self) -> jax.P:
        return jax.P(self.batch, self.read)

    @property
    def result(self) -> jax.P:
        return jax.P(self.batch, self.given, None)

    @property
    def spread(self) -> Axes:
        """Axes that the sum over V is scattered along T over."""
        return tuple(axis for axis in self.given if axis not in self.read)


def _places(table: tuple[int, ...], tokens: tuple[int, ...]) -> _Places:
    vocab, given = axes('vocab', table[0]), axes('sequence', tokens[1])
    # A device with the whole vocabulary needs no other's help for the positions that it keeps.
    read = axes('length', tokens[1]) if vocab else given
    return _Places(vocab, axes('embed', table[1]), axes('batch', tokens[0]), read, given)


def _own(tokens_BT: jax.Array, rows: int, vocab: Axes) -> jax.Array:
    """Returns where tokens are in the rows of this device: in no row, of others' tokens."""
    return tokens_BT - jax.lax.axis_index(vocab) * rows if vocab else tokens_BT


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rows(embedding_VC: jax.Array, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
    at = _places(embedding_VC.shape, tokens_BT.shape)

    def local(table_VC: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        table_VC = table_VC.astype(dtype)
        if at.width:
            table_VC = jax.lax.all_gather(table_VC, at.width, axis=1, tiled=True)
        own_BT = _own(tokens_BT, table_VC.shape[0], at.vocab)
        missing = 0 if at.vocab else jnp.nan
        x_BTC = table_VC.at[own_BT].get(
            mode='fill', fill_value=missing, wrap_negative_indices=False
        )
        if at.spread:
            return jax.lax.psum_scatter(x_BTC, at.spread, scatter_dimension=1, tiled=True)
        return jax.lax.psum(x_BTC, at.vocab) if at.vocab else x_BTC

    return on_each(local, (at.table, at.tokens), at.result)(embedding_VC, tokens_BT)


def _rows_forward(embedding_VC: jax.Array, tokens_BT: jax.Array, dtype: Any):
    empty = jnp.zeros((embedding_VC.shape[0], 0), embedding_VC.dtype)  # Tells size and type.
    return _rows(embedding_VC, tokens_BT, dtype), (empty, tokens_BT)


def _rows_backward(dtype: Any, residuals: tuple[jax.Array, jax.Array], dx_BTC: jax.Array):
    empty, tokens_BT = residuals
    at = _places((empty.shape[0], dx_BTC.shape[-1]), tokens_BT.shape)
    scatters = bool(at.width) and set(at.width) <= set(at.batch)  # Else all have the same sums.
    rest = tuple(a for a in (*at.batch, *at.read) if not (scatters and a in at.width))

    def local(dx_BTC: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        if at.spread:
            dx_BTC = jax.lax.all_gather(dx_BTC, at.spread, axis=1, tiled=True)
        rows = empty.shape[0] // jax.lax.axis_size(at.vocab) if at.vocab else empty.shape[0]
        sums_VC = jnp.zeros((rows, dx_BTC.shape[-1]), empty.dtype)
        own_BT = _own(tokens_BT, rows, at.vocab)
        sums_VC = sums_VC.at[own_BT].add(
            dx_BTC.astype(empty.dtype), mode='drop', wrap_negative_indices=False
        )
        if scatters:
            sums_VC = jax.lax.psum_scatter(sums_VC, at.width, scatter_dimension=1, tiled=True)
        return jax.lax.psum(sums_VC, rest) if rest else sums_VC

    table = at.table if scatters else jax.P(at.vocab, None)
    sums_VC = on_each(local, (at.result, at.tokens), table)(dx_BTC, tokens_BT)
    return constrain(sums_VC, 'vocab', 'embed'), None


_rows.defvjp(_rows_forward, _rows_backward)
