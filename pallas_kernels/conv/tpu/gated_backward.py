"""The backward kernel of WaveNet's gated residual unit: one block of one sequence, from its end.

The gates are made anew from x. A tap's part of dx lies before the outputs it comes from: the parts
are held in VMEM at the outputs' positions, and blocks and chunks go from the last to the first, so
that what comes from later positions is there.

Legend: N positions of a chunk, K taps, C channels, G gate channels, F = 2 G, S skip channels.
"""

import types
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.conv.tpu.gated_forward import begin, gates, inputs
from pallas_kernels.conv.tpu.gated_plan import Plan
from pallas_kernels.conv.tpu.layout import LANES
from pallas_kernels.conv.tpu.sequence_window import at_once, dot, for_chunks, joined, own_segment

SUBLANES = 8
# Outputs that all steps of a core add to.
SUMS = ('dw', 'dw_residual', 'dw_skip', 'dbias', 'dbias_residual', 'dbias_skip')


def kernel(plan: Plan, names: list[str], *all_refs: Any) -> None:
    """One grid step: (part of the batch, row of it, block of positions counted from the last)."""
    absent = dict.fromkeys(SUMS)
    refs = types.SimpleNamespace(**absent | dict(zip(names, all_refs, strict=True)))
    row, step = pl.program_id(1), pl.program_id(2)
    block = plan.blocks - 1 - step

    @pl.when((row == 0) & (step == 0))
    def _():
        for name in set(SUMS) & set(names):
            ref = getattr(refs, name)
            ref[...] = jnp.zeros(ref.shape, ref.dtype)

    _begin(plan, refs, block, step)

    def chunk(start: Any, size: int) -> None:
        _chunk(plan, refs, block, start, size)

    for_chunks(plan.window.rows, chunk, weights=plan.weights, reverse=True)
    # At once where that is not too long: a sum in memory that is read and written for every chunk
    # holds up the chunks after it.
    if at_once(plan.window.rows, plan.weights):
        _weights(plan, refs, block, 0, plan.window.rows)
    else:

        def some(start: Any, size: int) -> None:
            _weights(plan, refs, block, start, size)

        for_chunks(plan.window.rows, some, weights=plan.weights)
    if plan.state:
        pl.when(block == 0)(lambda: _state(plan, refs))


def _begin(plan: Plan, refs: types.SimpleNamespace, block: Any, step: Any) -> None:
    """Fills the window with x, and moves the later block's parts of dx behind this one."""
    window = plan.window

    def fill(start: Any, size: int) -> None:
        x_NC = refs.x[0, pl.ds(start, size)]
        window.store(refs.window, start, _existing(plan, block, start, x_NC))

    for_chunks(window.rows, fill)
    if not window.before:
        return

    @pl.when(step == 0)
    def _():
        shape = (*refs.parts.shape[:2], window.before, refs.parts.shape[3])
        refs.parts[:, :, window.rows :] = jnp.zeros(shape, jnp.float32)

    @pl.when(step > 0)
    def _():
        refs.parts[:, :, window.rows :] = refs.parts[:, :, : window.before]

    pl.when(block == 0)(lambda: begin(plan, refs))
    if plan.blocks > 1:

        @pl.when(block > 0)
        def _():
            size = refs.before.shape[1]
            window.store(refs.window, -window.before, refs.before[0, size - window.before :])


def _chunk(plan: Plan, refs: types.SimpleNamespace, block: Any, start: Any, size: int) -> None:
    """Makes dx of some positions and adds what they give to the weights' gradients."""
    rows = pl.ds(start, size)
    taps = inputs(plan, refs, start, size)
    tanh_NG, sigmoid_NG = gates(plan, refs, taps)
    dy_NC = _existing(plan, block, start, refs.dy[0, rows])
    dskip_NS = _existing(plan, block, start, refs.dskip[0, rows])
    z_NG = tanh_NG * sigmoid_NG
    dz_NG = _outputs(plan, refs, dy_NC, dskip_NS)
    dtanh_NG = dz_NG * (sigmoid_NG - z_NG * tanh_NG)
    dsigmoid_NG = dz_NG * (z_NG - z_NG * sigmoid_NG)
    da_NF = joined([dtanh_NG, dsigmoid_NG])
    refs.da[rows] = da_NF.astype(plan.dtype)
    refs.z[rows] = z_NG.astype(plan.dtype)
    *parts, here_NC = _convolution(plan, refs, refs.da[rows])
    dx_NC = here_NC if plan.partial else dy_NC.astype(jnp.float32) + here_NC
    for k, (part_NC, offset) in enumerate(zip(parts, plan.offsets, strict=False)):
        if plan.masked:
            part_NC = own_segment(part_NC, refs.same[0, k : k + 1, rows])
        plan.parts.store(refs.parts.at[k], start, part_NC)
        dx_NC += plan.parts.load(refs.parts.at[k], start + offset, size)
    refs.dx[0, rows] = dx_NC.astype(plan.dtype)
    sums = (da_NF, dy_NC, dskip_NS)
    for x, ref in zip(sums, (refs.dbias, refs.dbias_residual, refs.dbias_skip), strict=True):
        if ref is not None:
            ref[0] += _rows(x.astype(jnp.float32))


def _outputs(plan, refs, dy_NC, dskip_NS) -> jax.Array:
    """Returns dz, [N, G] in float32."""
    if plan.apart:
        dz_NG = dot(dy_NC, refs.w_residual[...], (1, 1))
        return dz_NG + dot(dskip_NS, refs.w_skip[...], (1, 1))
    w = joined([refs.w_residual[...], refs.w_skip[...]])
    return dot(joined([dy_NC, dskip_NS]), w, (1, 1))


def _convolution(plan, refs, da_NF) -> list[jax.Array]:
    """Returns what each tap gives to dx, [N, C] in float32."""
    K, C = len(plan.offsets), plan.C
    if C % LANES:
        return [dot(da_NF, refs.w[k], (1, 1)) for k in range(K)]
    parts = dot(da_NF, refs.w[...].reshape(K * C, -1), (1, 1))
    return [parts[:, k * C : (k + 1) * C] for k in range(K)]


def _weights(plan: Plan, refs: types.SimpleNamespace, block: Any, start: Any, size: int) -> None:
    """Adds what some positions give to the gradients of the weights."""
    C, rows = plan.C, pl.ds(start, size)
    taps, da_NF, z_NG = inputs(plan, refs, start, size), refs.da[rows], refs.z[rows]
    dy_NC = _existing(plan, block, start, refs.dy[0, rows])
    dskip_NS = _existing(plan, block, start, refs.dskip[0, rows])
    if plan.apart:
        for k, x_NC in enumerate(taps):
            refs.dw[0, k] += dot(x_NC, da_NF, (0, 0))
        refs.dw_residual[0] += dot(z_NG, dy_NC, (0, 0))
        refs.dw_skip[0] += dot(z_NG, dskip_NS, (0, 0))
        return
    dw = dot(joined(taps), da_NF, (0, 0))
    for k in range(len(taps)):
        refs.dw[0, k] += dw[k * C : (k + 1) * C]
    dw = dot(z_NG, joined([dy_NC, dskip_NS]), (0, 0))
    refs.dw_residual[0] += dw[:, :C]
    refs.dw_skip[0] += dw[:, C:]


def _rows(x_NC: jax.Array) -> jax.Array:
    """Returns sums over positions, in eight rows: no step across sublanes."""
    return x_NC.reshape(-1, SUBLANES, x_NC.shape[1]).sum(0)


def _existing(plan: Plan, block: Any, start: Any, x_NC: jax.Array) -> jax.Array:
    """Returns zeros for positions behind the sequence's end, which would reach the sums."""
    if not plan.ragged:
        return x_NC
    position = jax.lax.broadcasted_iota(jnp.int32, x_NC.shape, 0)
    exists = position < plan.T - block * plan.window.rows - start
    return jnp.where(exists, x_NC.astype(jnp.float32), 0).astype(x_NC.dtype)


def _state(plan: Plan, refs: types.SimpleNamespace) -> None:
    """Writes the gradient of what is before the first position."""
    before = plan.window.before
    refs.dstate[0] = jnp.zeros((before, plan.C), refs.dstate.dtype)
    total = jnp.zeros((plan.offsets[0], plan.C), jnp.float32)
    for k, offset in enumerate(plan.offsets[:-1]):
        # dstate's last row is the position before the first, which tap k reads `offset` later.
        part = plan.parts.load(refs.parts.at[k], 0, offset)
        none = jnp.zeros((plan.offsets[0] - offset, plan.C), jnp.float32)
        total += jnp.concatenate([none, part]) if offset < plan.offsets[0] else part
    refs.dstate[0, before - plan.offsets[0] :] = total.astype(refs.dstate.dtype)
