"""WaveNet's gated residual unit as Mosaic TPU kernels: forward, backward, and what they refuse.

Legend: B batch, T positions, K taps, C channels, G gate channels padded to whole lanes, F = 2 G,
S skip channels, R = (K - 1) * dilation positions before the first.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.conv.gated_arguments import GatedOperands, reach, same_segment_BKT
from pallas_kernels.conv.tpu import gated_backward, gated_forward
from pallas_kernels.conv.tpu.gated_backward import SUBLANES
from pallas_kernels.conv.tpu.gated_plan import Plan, plan, vmem_bytes
from pallas_kernels.conv.tpu.layout import pad_last, target
from pallas_kernels.conv.tpu.sequence_window import around, whole_blocks
from pallas_kernels.mesh import result


def refuses(operands: GatedOperands, dilation: int) -> str | None:
    """Returns why the kernels do not take a call, None if they do."""
    dtype, chip = operands.x_BTC.dtype, target()[0]
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f'takes bfloat16 and float32, and x is {dtype.name}'
    needed = vmem_bytes(plan(operands, dilation, chip))
    if needed > chip.vmem_limit:
        return (
            f'takes what fits into {chip.vmem_limit} bytes of VMEM, and these weights with '
            f'{reach(operands, dilation)} positions before an output need about {needed}'
        )
    return None


def forward(
    operands: GatedOperands, dilation: int, *, partial: bool = False, interpret: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the residual output [B, T, C] and the skip output [B, T, S] in x's type.

    Args:
      operands: bfloat16 or float32.
      dilation: distance between the positions that taps read.
      partial: whether to leave out x, which the residual output adds to.
      interpret: passed to `pallas_call`; None interprets unless the current chip is a TPU.
    """
    chip, compiled = target()
    unit = plan(operands, dilation, chip, partial=partial)
    B, rows = operands.x_BTC.shape[0], unit.window.rows
    inputs = {'x': (operands.x_BTC, pl.BlockSpec((1, rows, unit.C), lambda b, i: (b, i, 0)))}
    inputs |= {name: (array, whole(array)) for name, array in weights(operands, unit).items()}
    if unit.masked:
        same = whole_blocks(same_segment_BKT(operands, dilation), unit.window.rows)
        spec = pl.BlockSpec((1, same.shape[1], rows), lambda b, i: (b, 0, i))
        inputs['same'] = same, spec
    if unit.state:
        state = state_before(operands.state_BRC, unit)
        inputs['state'] = state, pl.BlockSpec((1, *state.shape[1:]), lambda b, i: (b, 0, 0))
    arrays, specs = zip(*inputs.values(), strict=True)
    names = [*inputs, 'y', 'skip', 'window']
    y_BTC, skip_BTS = pl.pallas_call(
        functools.partial(gated_forward.kernel, unit, names),
        grid=(B, unit.blocks),
        in_specs=specs,
        out_specs=[
            pl.BlockSpec((1, rows, size), lambda b, i: (b, i, 0)) for size in (unit.C, unit.S)
        ],
        out_shape=[result((B, unit.T, size), unit.dtype, operands) for size in (unit.C, unit.S)],
        scratch_shapes=[unit.window.scratch],
        # What is before a block is kept from the one before it.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'arbitrary'),
            vmem_limit_bytes=chip.vmem_limit if compiled else None,
        ),
        interpret=not compiled if interpret is None else interpret,
        name='gated_conv1d_forward',
    )(*arrays)
    return y_BTC, skip_BTS


def backward(
    operands: GatedOperands,
    dilation: int,
    dy_BTC: jax.Array,
    dskip_BTS: jax.Array,
    *,
    partial: bool = False,
    interpret: Any = None,
) -> GatedOperands:
    """Returns the gradients of all arrays but the segment ids, each in its own type.

    Args:
      operands: as `forward` takes them.
      dilation: likewise.
      dy_BTC: cotangent of the residual output, in x's type.
      dskip_BTS: cotangent of the skip output, in x's type.
      partial: whether to leave out of dx what comes from `dy_BTC` directly.
      interpret: as in `forward`.
    """
    chip, compiled = target()
    unit = plan(operands, dilation, chip, partial=partial)
    B, window, last = operands.x_BTC.shape[0], unit.window, unit.blocks - 1
    # Each core of a chip sums over its own part of the batch.
    parts = chip.cores if B % chip.cores == 0 else 1
    each = B // parts

    def rows(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, window.rows, size), lambda p, b, i: (p * each + b, last - i, 0))

    x, arrays = operands.x_BTC, weights(operands, unit)
    inputs = {
        'x': (x, rows(unit.C)),
        'dy': (dy_BTC, rows(unit.C)),
        'dskip': (dskip_BTS, rows(unit.S)),
    }
    inputs |= {name: (array, whole(array)) for name, array in arrays.items()}
    if window.before and unit.blocks > 1:
        size = around(window.before, window.rows)
        ratio = window.rows // size
        inputs['before'] = (
            x,
            pl.BlockSpec(
                (1, size, unit.C),
                lambda p, b, i: (p * each + b, jnp.maximum((last - i) * ratio - 1, 0), 0),
            ),
        )
    if unit.masked:
        same = whole_blocks(same_segment_BKT(operands, dilation), unit.window.rows)
        inputs['same'] = (
            same,
            pl.BlockSpec(
                (1, same.shape[1], window.rows), lambda p, b, i: (p * each + b, 0, last - i)
            ),
        )
    state_spec = pl.BlockSpec((1, window.before, unit.C), lambda p, b, i: (p * each + b, 0, 0))
    if unit.state:
        inputs['state'] = state_before(operands.state_BRC, unit), state_spec
    outputs = {'dx': (x.shape, unit.dtype, rows(unit.C))}
    if unit.state:
        outputs['dstate'] = (B, window.before, unit.C), unit.dtype, state_spec
    for name, array in arrays.items():
        shape = array.shape if name.startswith('w') else (SUBLANES, array.shape[1])
        nothing = (0,) * len(shape)
        spec = pl.BlockSpec((1, *shape), lambda p, b, i, nothing=nothing: (p, *nothing))
        outputs['d' + name] = (parts, *shape), jnp.float32, spec
    values, specs = zip(*inputs.values(), strict=True)
    scratch = {'window': window.scratch}
    scratch['da'] = pltpu.VMEM((window.rows, 2 * unit.G), unit.dtype)
    scratch['z'] = pltpu.VMEM((window.rows, unit.G), unit.dtype)
    if window.before:
        kept = unit.parts.scratch
        scratch['parts'] = pltpu.VMEM((len(unit.offsets) - 1, *kept.shape), kept.dtype)
    found = pl.pallas_call(
        functools.partial(gated_backward.kernel, unit, [*inputs, *outputs, *scratch]),
        grid=(parts, each, unit.blocks),
        in_specs=specs,
        out_specs=[spec for *_, spec in outputs.values()],
        out_shape=[
            result(shape, dtype, (operands, dy_BTC, dskip_BTS))
            for shape, dtype, _ in outputs.values()
        ],
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'arbitrary', 'arbitrary'),
            vmem_limit_bytes=chip.vmem_limit if compiled else None,
        ),
        interpret=not compiled if interpret is None else interpret,
        name='gated_conv1d_backward',
    )(*values)
    return _gradients(operands, dict(zip(outputs, found, strict=True)))


def whole(array: jax.Array) -> pl.BlockSpec:
    """A block that is all of an array, copied once."""
    return pl.BlockSpec(
        array.shape, lambda *_: (0,) * array.ndim, pipeline_mode=pl.Buffered(buffer_count=1)
    )


def weights(operands: GatedOperands, unit: Plan) -> dict[str, jax.Array]:
    """The kernels' weights by name, gates padded with zeros, which add nothing to any output."""
    bias_F, bias_residual_C, bias_skip_S = operands[4:7]
    found = {
        'w': _halves(operands.w_KCF, unit.G),
        'w_residual': _gates(operands.w_residual_GC, unit.G),
        'w_skip': _gates(operands.w_skip_GS, unit.G),
    }
    if bias_F is not None:
        found['bias'] = _halves(bias_F.astype(jnp.float32)[None], unit.G)
    if bias_residual_C is not None:
        found['bias_residual'] = bias_residual_C.astype(jnp.float32)[None]
    if bias_skip_S is not None:
        found['bias_skip'] = bias_skip_S.astype(jnp.float32)[None]
    return found


def state_before(state_BRC: jax.Array, unit: Plan) -> jax.Array:
    """The state as the rows of the window before a block, zeros where no tap reads."""
    missing = unit.window.before - state_BRC.shape[1]
    return jnp.pad(state_BRC, ((0, 0), (missing, 0), (0, 0)))


def _gradients(operands: GatedOperands, found: dict[str, jax.Array]) -> GatedOperands:
    """The gradients as the operands are, from what the kernel wrote."""
    G, R = operands.w_residual_GC.shape[0], 0
    sums = {name: x.sum(0) for name, x in found.items() if name not in ('dx', 'dstate')}

    def halves(x):
        tanh, sigmoid = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([tanh[..., :G], sigmoid[..., :G]], axis=-1)

    def of(operand, name, cut=lambda x: x):
        return None if operand is None else cut(sums[name]).astype(operand.dtype)

    state = operands.state_BRC
    if state is not None:
        R = state.shape[1]
        state = found['dstate'][:, -R:] if 'dstate' in found else jnp.zeros_like(state)
    return GatedOperands(
        found['dx'],
        of(operands.w_KCF, 'dw', halves),
        of(operands.w_residual_GC, 'dw_residual', lambda x: x[:G]),
        of(operands.w_skip_GS, 'dw_skip', lambda x: x[:G]),
        of(operands.bias_F, 'dbias', lambda x: halves(x.sum(0))),
        of(operands.bias_residual_C, 'dbias_residual', lambda x: x.sum(0)),
        of(operands.bias_skip_S, 'dbias_skip', lambda x: x.sum(0)),
        state,
    )


def _halves(w: jax.Array, G: int) -> jax.Array:
    """Both halves of the last dimension padded to G each."""
    tanh, sigmoid = jnp.split(w, 2, axis=-1)
    return jnp.concatenate([pad_last(tanh, G), pad_last(sigmoid, G)], axis=-1)


def _gates(w: jax.Array, G: int) -> jax.Array:
    return jnp.pad(w, ((0, G - w.shape[0]), (0, 0)))
