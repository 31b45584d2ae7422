"""What one grid step of a convolution of few channels does.

Legend: C O channels and features, H input rows, Q output columns, V columns of all phases.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.conv import epilogue
from pallas_kernels.conv.tpu import layout
from pallas_kernels.conv.tpu.stem_plan import LANES, SUBLANES, Plan

ROWS = 2  # the axis of the grid with blocks of rows
UNROLLED = 4  # groups of rows in a basic block


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """Matrix product accumulated in float32, exact products also for float32 inputs."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)


def forward(plan: Plan, x_ref: Any, w_ref: Any, *refs: Any) -> None:
    """Makes a block of outputs, u and y."""
    named = dict(zip(plan.given, refs, strict=False))
    y_ref, *u_ref, phases_ref = refs[len(plan.given) :]
    pl.when(pl.program_id(ROWS) == 0)(lambda: split(plan, x_ref, phases_ref))
    first = pl.program_id(ROWS) * plan.groups
    w = kernels(plan, w_ref)

    def product(i):
        columns = gathered(plan, phases_ref, jnp.minimum(first + i, plan.last_group))
        sums = dot(w, columns)
        for row in range(plan.group):
            for image in range(plan.images):
                u_OQ = sums[
                    row * plan.outputs : row * plan.outputs + plan.features,
                    image * plan.lanes : image * plan.lanes + plan.size_out[1],
                ]
                _finish(plan, u_OQ, (image, i * plan.group + row), named, y_ref, u_ref)

    _each(plan, product)


def _finish(plan: Plan, u_OQ, at, named, y_ref, u_ref) -> None:
    """The epilogue of one output row of one image."""
    column = lambda name: named[name][...] if name in named else None  # noqa: E731
    if 'bias' in named:
        u_OQ = u_OQ + column('bias')
    if plan.keep:
        u_ref[0][at] = u_OQ.astype(u_ref[0].dtype)
    residual = named['residual'][at] if 'residual' in named else None
    scale, shift = column('scale'), column('shift')
    y_OQ = epilogue.finish(u_OQ, plan.activation, scale=scale, shift=shift, residual=residual)
    y_ref[at] = y_OQ.astype(y_ref.dtype)


def input_gradient(plan: Plan, du_ref: Any, w_ref: Any, dx_ref: Any, phases_ref: Any) -> None:
    """Makes the gradients of a block of images, over all of their blocks of rows."""
    step = pl.program_id(ROWS)
    pl.when(step == 0)(lambda: _clear(phases_ref))
    w = kernels(plan, w_ref)

    def product(i):
        columns = dot(w, cotangents(plan, du_ref, step, i), (0, 0))
        group = jnp.minimum(step * plan.groups + i, plan.last_group)
        _scatter(plan, columns, phases_ref, group)

    _each(plan, product)
    pl.when(step == pl.num_programs(ROWS) - 1)(lambda: _join(plan, phases_ref, dx_ref))


def _clear(ref: Any) -> None:
    ref[...] = jnp.zeros_like(ref)


def _scatter(plan: Plan, columns: jax.Array, phases_ref: Any, group) -> None:
    """Adds a window's gradients to those of the phases, in rows here, not in words."""
    size, width = plan.window, plan.phase_lanes
    rows = plan.words
    for image in range(plan.images):
        sums = [None] * len(plan.phases)
        for tap in range(plan.taps[1]):
            phase, shift = plan.shift(tap)
            part = columns[tap * size : tap * size + plan.channels * rows]
            part = part[:, image * plan.lanes : (image + 1) * plan.lanes]
            part = jnp.pad(part, ((0, 0), (0, width - plan.lanes)))
            part = pltpu.roll(part, shift, 1) if shift else part
            sums[phase] = part if sums[phase] is None else sums[phase] + part
        for n, part in enumerate(sums):
            for channel in range(plan.channels):
                here = part[channel * rows : (channel + 1) * rows]
                for tile in range(width // LANES):
                    at = n * (width // LANES) + tile
                    where = image, at, channel, pl.ds(plan.first(group), rows)
                    phases_ref[where] += here[:, tile * LANES : (tile + 1) * LANES]


def _join(plan: Plan, phases_ref: Any, dx_ref: Any) -> None:
    """Takes the phases' gradients to the columns: each is that of one column."""
    select = selection(plan, dx_ref.dtype)
    first = plan.before
    for image in range(plan.images):
        for channel in range(plan.channels):
            tiles = range(phases_ref.shape[1])
            rows = pl.ds(first, plan.size_in[0])
            parts = [phases_ref[image, tile, channel, rows] for tile in tiles]
            wide = jnp.concatenate(parts, 1).astype(dx_ref.dtype)
            dx_ref[image, channel] = dot(wide, select, (1, 1)).astype(dx_ref.dtype)


def weight_gradient(plan: Plan, x_ref: Any, du_ref: Any, dw_ref: Any, phases_ref: Any) -> None:
    """Adds a block's part of the gradient of the kernels."""
    step = pl.program_id(ROWS)
    pl.when((pl.program_id(1) == 0) & (step == 0))(lambda: _clear(dw_ref))
    pl.when(step == 0)(lambda: split(plan, x_ref, phases_ref))

    def product(i):
        group = jnp.minimum(step * plan.groups + i, plan.last_group)
        columns = gathered(plan, phases_ref, group)
        sums = dot(cotangents(plan, du_ref, step, i), columns, (1, 1))
        for row in range(plan.group):
            part = sums[row * plan.outputs : (row + 1) * plan.outputs]
            dw_ref[0, :, row * plan.padded : row * plan.padded + plan.contracted] += part

    _each(plan, product)


def kernels(plan: Plan, w_ref: Any) -> jax.Array:
    """Returns the kernels of a product, [group * outputs, contracted]."""
    starts = [row * plan.padded for row in range(plan.group)]
    return jnp.concatenate([w_ref[:, at : at + plan.contracted] for at in starts])


def selection(plan: Plan, dtype: Any) -> jax.Array:
    """Returns the ones and zeros that take columns to phases, [W, phases * lanes]."""
    (_, W), width = plan.size_in, plan.phase_lanes
    shape = W, len(plan.phases) * width
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    place = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    wanted = place * plan.stride[1] + (plan.phases[0] - plan.low[1])
    for n in range(1, len(plan.phases)):
        here = (place - n * width) * plan.stride[1] + (plan.phases[n] - plan.low[1])
        wanted = jnp.where(place >= n * width, here, wanted)
    return (column == wanted).astype(jnp.float32).astype(dtype)


def split(plan: Plan, x_ref: Any, phases_ref: Any) -> None:
    """Splits the columns of a block's images into phases, as words of rows."""
    select = selection(plan, x_ref.dtype)
    _clear(phases_ref)
    rows = plan.held * plan.packing
    odd = plan.low[0] % plan.packing
    for image in range(plan.images):
        for channel in range(plan.channels):
            x_HV = dot(x_ref[image, channel], select)
            x_HV = jnp.pad(x_HV, ((odd, rows - odd - plan.size_in[0]), (0, 0)))
            words = pltpu.bitcast(x_HV.astype(x_ref.dtype), jnp.int32)
            for tile in range(phases_ref.shape[1]):
                part = words[:, tile * LANES : (tile + 1) * LANES]
                phases_ref[image, tile, channel, pl.ds(plan.before, plan.held)] = part


def gathered(plan: Plan, phases_ref: Any, group) -> jax.Array:
    """Returns what a group of output rows sees, [contracted, images * lanes]."""
    tiles = plan.phase_lanes // LANES
    images = []
    for image in range(plan.images):
        windows = []
        for n in range(len(plan.phases)):
            parts = [
                _window(plan, phases_ref, (image, n * tiles + tile), group) for tile in range(tiles)
            ]
            windows.append(jnp.concatenate(parts, 1))
        taps = []
        for tap in range(plan.taps[1]):
            phase, shift = plan.shift(tap)
            words = windows[phase]
            if shift:
                words = pltpu.roll(words, plan.phase_lanes - shift, 1)
            taps.append(words[:, : plan.lanes])
        images.append(jnp.concatenate(taps))
    columns = images[0] if len(images) == 1 else jnp.concatenate(images, 1)
    dtype = jnp.float32 if plan.packing == 1 else jnp.bfloat16
    return pltpu.bitcast(columns, dtype)


def _window(plan: Plan, phases_ref: Any, at, group) -> jax.Array:
    """Returns the words of all channels in a group's window, [window, LANES]."""
    row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    registers = []
    for start in range(0, plan.window, SUBLANES):
        found = None
        for channel in range(plan.channels):
            low, high = (n * plan.words - start for n in (channel, channel + 1))
            if high <= 0 or low >= SUBLANES:
                continue
            # Words before and behind the channel's own are another's, or met by zeros.
            where = pl.ds(plan.first(group) - low, SUBLANES)
            words = phases_ref[(*at, channel, where)]
            found = words if found is None else jnp.where(row >= low, words, found)
        registers.append(found)
    return jnp.concatenate(registers)


def cotangents(plan: Plan, du_ref: Any, step, group) -> jax.Array:
    """Returns the cotangents of a group of output rows, [group * outputs, images * lanes]."""
    P, Q = plan.size_out
    rows = []
    for row in range(plan.group):
        images = []
        for image in range(plan.images):
            at = group * plan.group + row
            du_OQ = du_ref[image, at]
            if P % plan.rows:
                there = step * plan.rows + at < P
                du_OQ = jnp.where(there, du_OQ, jnp.zeros_like(du_OQ))
            pads = ((0, plan.outputs - plan.features), (0, plan.lanes - Q))
            images.append(jnp.pad(du_OQ, pads))
        rows.append(jnp.concatenate(images, 1))
    return jnp.concatenate(rows)


def _each(plan: Plan, body: Any) -> None:
    """Does every group of a block; some in one basic block, so that one's loads hide another's."""
    together = layout.largest_divisor(plan.groups, UNROLLED)

    def several(i, carry):
        for n in range(together):
            body(i * together + n)
        return carry

    jax.lax.fori_loop(0, plan.groups // together, several, 0)
