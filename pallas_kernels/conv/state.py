"""The inputs before a causal convolution's first: how a sequence goes on, step by step.

Legend: B batch, T positions, S = (K - 1) * dilation positions before the first, C channels.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.conv.arguments import Operands, Spec


class Continued(NamedTuple):
    """A causal conv1d whose earlier inputs stand before its own.

    `skip` is how many outputs, at the start, are of the state's positions.
    """

    operands: Operands
    spec: Spec
    skip: int


def continued(operands: Operands, spec: Spec, state_BSC: jax.Array) -> Continued:
    """Returns the operands and the specification with the state where padding's zeros would be.

    Segments have as many outputs as inputs, so there the zeros come before the state, and what it
    would give is left out of the result. The state's inputs are of the segment of x's first.
    """
    x_B1TC = jnp.concatenate([state_BSC[:, None], operands.x_BHWC], axis=2)
    ids_BT, S = operands.segment_ids_BT, state_BSC.shape[1]
    operands = operands._replace(x_BHWC=x_B1TC)
    if ids_BT is None:
        spec = dataclasses.replace(spec, padding=((0, 0), (0, 0)))
        return Continued(operands, spec, 0)
    before_BS = jnp.broadcast_to(ids_BT[:, :1], state_BSC.shape[:2])
    ids_BT = jnp.concatenate([before_BS, ids_BT], axis=1)
    return Continued(operands._replace(segment_ids_BT=ids_BT), spec, S)


def next_state(operands: Operands, state_BSC: jax.Array | None, S: int) -> jax.Array:
    """Returns the last S inputs, those of other segments than the last one's being zeros.

    Args:
      operands: of a causal conv1d, x without its state.
      state_BSC: the inputs before x; None is zeros.
      S: how many.
    """
    x_BTC, ids_BT = operands.x_BHWC[:, 0], operands.segment_ids_BT
    B, T, C = x_BTC.shape
    if state_BSC is None:
        state_BSC = jnp.zeros((B, S, C), x_BTC.dtype)
    if ids_BT is not None:
        last_BT = ids_BT == ids_BT[:, -1:]
        x_BTC = jnp.where(last_BT[..., None], x_BTC, 0)
        state_BSC = jnp.where(last_BT[:, :1, None], state_BSC, 0)
    return jnp.concatenate([state_BSC, x_BTC], axis=1)[:, T:]


def carried(
    run: Callable[[Operands, Spec], jax.Array],
    operands: Operands,
    spec: Spec,
    state_BSC: jax.Array | None,
    return_state: bool,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Returns a conv1d's y_BTO and, with `return_state`, the state after it.

    Args:
      run: makes y_B1TO.
      operands: without the state.
      spec: what is static.
      state_BSC: the inputs before x; None is zeros.
      return_state: whether the next state is returned.
    """
    here, static, skip = operands, spec, 0
    if state_BSC is not None:
        here, static, skip = continued(operands, spec, state_BSC)
    y_BTO = run(here, static)[:, 0, skip:]
    S = spec.padding[1][0]
    return (y_BTO, next_state(operands, state_BSC, S)) if return_state else y_BTO
