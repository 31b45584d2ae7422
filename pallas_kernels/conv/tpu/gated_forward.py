"""The forward kernel of WaveNet's gated residual unit: one block of one sequence.

Legend: N positions of a chunk, C channels, G gate channels, F = 2 G, S skip channels.
"""

import types
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.conv.tpu.gated_plan import Plan
from pallas_kernels.conv.tpu.sequence_window import (
    dot,
    for_chunks,
    joined,
    own_segment,
    product,
)


def kernel(plan: Plan, names: list[str], *all_refs: Any) -> None:
    """One grid step: (batch row, block of positions)."""
    refs = types.SimpleNamespace(**dict(zip(names, all_refs, strict=True)))
    window, block = plan.window, pl.program_id(1)
    if window.before:
        pl.when(block == 0)(lambda: begin(plan, refs))

        @pl.when(block > 0)
        def _():
            refs.window[:, : window.before] = refs.window[:, window.rows :]

    def chunk(start: Any, size: int) -> None:
        rows = pl.ds(start, size)
        x_NC = refs.x[0, rows]
        window.store(refs.window, start, x_NC)
        tanh_NG, sigmoid_NG = gates(plan, refs, inputs(plan, refs, start, size))
        z_NG = (tanh_NG * sigmoid_NG).astype(plan.dtype)
        residual_NC, skip_NS = outputs(plan, refs, z_NG)
        if plan.biases[1]:
            residual_NC += refs.bias_residual[...]
        if plan.biases[2]:
            skip_NS += refs.bias_skip[...]
        if not plan.partial:
            residual_NC += x_NC.astype(jnp.float32)
        refs.y[0, rows] = residual_NC.astype(plan.dtype)
        refs.skip[0, rows] = skip_NS.astype(plan.dtype)

    for_chunks(window.rows, chunk, weights=plan.weights)


def begin(plan: Plan, refs: types.SimpleNamespace) -> None:
    """Puts what is before a sequence's first position where taps find it."""
    window = plan.window
    if plan.state:
        window.store(refs.window, -window.before, refs.state[0])
    else:
        columns, _, lanes = refs.window.shape
        zeros = jnp.zeros((columns, window.before, lanes), jnp.float32)
        refs.window[:, : window.before] = zeros


def inputs(plan: Plan, refs: types.SimpleNamespace, start: Any, size: int) -> list[jax.Array]:
    """Returns what each tap reads, [N, C]."""
    taps = []
    for k, offset in enumerate(plan.offsets):
        x_NC = plan.window.load(refs.window, start - offset, size)
        if plan.masked and offset:
            x_NC = own_segment(x_NC, refs.same[0, k : k + 1, pl.ds(start, size)])
        taps.append(x_NC.astype(plan.dtype))
    return taps


def gates(
    plan: Plan, refs: types.SimpleNamespace, taps: list[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Returns both factors of z, [N, G] in float32."""
    a_NF = product(taps, refs.w)
    if plan.biases[0]:
        a_NF += refs.bias[...]
    # The sigmoid as a tanh: one transcendental function, where it is an exponential and a division.
    tanh_NG, sigmoid_NG = jnp.tanh(a_NF[:, : plan.G]), jnp.tanh(a_NF[:, plan.G :] * 0.5)
    return tanh_NG, sigmoid_NG * 0.5 + 0.5


def outputs(
    plan: Plan, refs: types.SimpleNamespace, z_NG: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns z times the weights of residual [N, C] and skip [N, S], in float32."""
    if plan.apart:
        return dot(z_NG, refs.w_residual[...]), dot(z_NG, refs.w_skip[...])
    both = dot(z_NG, joined([refs.w_residual[...], refs.w_skip[...]]))
    return both[:, : plan.C], both[:, plan.C :]
