"""The kernel's gradient of a dense convolution: a product over images and space for each tap.

With the cotangent turned, [O, M], and the inputs that a tap sees as they lie, [M, C], both once for
some 1024 outputs, the product sums M in the matrix unit. Sums of all taps stay in VMEM, in float32,
while the grid goes over batch and rows; the first axis of the grid is for the chip's cores.

Legend: K L kernel rows and columns, C input channels, O output channels, N cores, B batch, H W P Q
input and output rows and columns, M outputs of a product.
"""

import functools
import itertools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.conv.tpu import dense_kernel
from pallas_kernels.conv.tpu.dense_kernel import Rows, beside, dot
from pallas_kernels.conv.tpu.dense_plan import FEATURES, Plan
from pallas_kernels.mesh import result


def call(
    plan: Plan, x_HWBC: jax.Array, du_PQBO: jax.Array, cores: int, limit: int | None, interpret: Any
) -> jax.Array:
    """Returns dw_NKLOC in float32, a part of the sum for each of N cores, from padded arrays."""
    batches = plan.B // plan.batch
    cores = cores if batches % cores == 0 else 1

    def batch(n, b):
        return n * (batches // cores) + b

    image = pl.BlockSpec(plan.y_block, lambda n, o, b, i: (i, 0, batch(n, b), o))
    inputs = {'x': x_HWBC, 'du': du_PQBO}
    K, L, O, C = plan.dw_block  # noqa: E741
    scratch = dense_kernel.scratch(plan, x_HWBC.dtype)
    return pl.pallas_call(
        functools.partial(_kernel, plan, [*inputs, 'dw', *scratch]),
        grid=(cores, plan.O // plan.features, batches // cores, plan.n_rows),
        in_specs=[dense_kernel.window(plan, lambda n, o, b, i: (i, batch(n, b))), image],
        out_specs=pl.BlockSpec((pl.squeezed, K, L, O, C), lambda n, o, b, i: (n, 0, 0, o, 0)),
        scratch_shapes=list(scratch.values()),
        out_shape=result((cores, K, L, plan.O // plan.features * O, C), jnp.float32, inputs),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'parallel', 'arbitrary', 'arbitrary'),
            vmem_limit_bytes=limit,
        ),
        name='conv_dense_weights',
        interpret=interpret,
    )(*inputs.values())


def _kernel(plan: Plan, names: list[str], *refs: Any) -> None:
    """One grid step: (core, block of features, of the batch, of rows)."""
    refs = types.SimpleNamespace(**dict(zip(names, refs, strict=True)))
    dw_ref = refs.dw
    if plan.packing is not None:
        refs.dw = refs.dw_packed
    block = pl.program_id(3) if plan.n_rows > 1 else 0

    @pl.when((pl.program_id(2) == 0) & (block == 0))
    def _():
        refs.dw[...] = jnp.zeros_like(refs.dw)

    if plan.packed:
        dense_kernel.inputs_side_by_side(plan, refs.x, refs.x_packed)
        refs.x = refs.x_packed
    if plan.packing is not None:
        _outputs_side_by_side(plan, refs.du, refs.du_packed)
        refs.du = refs.du_packed

    def run(rows: Rows) -> None:
        for places, pairs in dense_kernel.tiles(plan, rows):
            for part in itertools.batched(places, plan.places):
                for low in range(0, plan.features, FEATURES):
                    high = min(low + FEATURES, plan.features)
                    _tile(plan, refs, rows, list(part), pairs, slice(low, high))

    dense_kernel.over_rows(plan, block, run)
    if plan.packing is not None:
        last = pl.program_id(2) == pl.num_programs(2) - 1
        pl.when(last & (block == plan.n_rows - 1))(lambda: _fold(plan, refs.dw, dw_ref))


def _fold(plan: Plan, from_ref: Any, to_ref: Any) -> None:
    """Sums each tap over the places that it has where outputs lie side by side."""
    table = plan.packing.table
    K, L, O, C = to_ref.shape  # noqa: E741
    for k, l in np.ndindex(K, L):  # noqa: E741
        parts = [
            from_ref[down, right, n * O : (n + 1) * O, i * C : (i + 1) * C]
            for down, right, i, n in np.argwhere(table == k * L + l).tolist()
        ]
        to_ref[k, l] = functools.reduce(jnp.add, parts)


def _outputs_side_by_side(plan: Plan, from_ref: Any, to_ref: Any) -> None:
    """Puts neighbouring outputs of a block into the lanes."""
    packing = plan.packing
    zeros = jnp.zeros(from_ref.shape[2:], from_ref.dtype)

    @pl.loop(0, plan.out_rows)
    def _(row):
        for block in range(plan.cols.size_out):
            places = [(row * packing.r + a, block * packing.g + b) for a, b in packing.parts]
            parts = [from_ref[at] if at[1] < from_ref.shape[1] else zeros for at in places]
            to_ref[row, block] = jnp.concatenate(parts, axis=1)


def _tile(plan: Plan, refs, rows: Rows, places, pairs, features: slice) -> None:
    """Adds what some outputs give to all taps."""
    sees = functools.partial(dense_kernel.source, plan, rows)
    ats = [(at.row, at.col) for at in places]
    du_OM = dense_kernel.read(plan, refs.du, rows.y, ats, features).T
    seen = [pair for pair in pairs if any(sees(at, pair) for at in places)]
    for group in itertools.batched(seen, plan.together):
        x_MC = beside(
            dense_kernel.read(plan, refs.x, rows.x, [sees(at, pair) for at in places])
            for pair in group
        )
        for low in range(0, x_MC.shape[1], FEATURES):
            product_OC = dot(du_OM, x_MC[:, low : low + FEATURES])
            for start in range(0, product_OC.shape[1], plan.C):
                n, channel = divmod(low + start, plan.C)
                down, right = group[n]
                part_OC = product_OC[:, start : start + plan.C]
                channels = slice(channel, channel + part_OC.shape[1])
                refs.dw[down[0], right[0], features, channels] += part_OC
