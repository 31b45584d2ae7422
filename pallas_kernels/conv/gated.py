"""WaveNet's gated residual unit with its derivatives: the public function.

Legend: B batch, T positions, K taps, C channels, G gate channels, F = 2 G, S skip channels,
R = (K - 1) * dilation positions before the first.
"""

import functools
from types import ModuleType
from typing import Any

import jax

from pallas_kernels.chip import current_chip
from pallas_kernels.conv.arguments import Operands
from pallas_kernels.conv.choice import Implementation
from pallas_kernels.conv.gated_arguments import GatedOperands, check_gated, reach
from pallas_kernels.conv.gated_plain import reference, xla
from pallas_kernels.conv.gated_sharded import sharded
from pallas_kernels.conv.partition import Axes
from pallas_kernels.conv.state import next_state
from pallas_kernels.conv.wins import gated_wins

Outputs = tuple[jax.Array, jax.Array]


def gated_conv1d(
    x_BTC: jax.Array,
    w_KCF: jax.Array,
    w_residual_GC: jax.Array,
    w_skip_GS: jax.Array,
    *,
    dilation: int = 1,
    bias_F: jax.Array | None = None,
    bias_residual_C: jax.Array | None = None,
    bias_skip_S: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    state: jax.Array | None = None,
    return_state: bool = False,
    impl: Implementation | None = None,
) -> Outputs | tuple[jax.Array, jax.Array, jax.Array]:
    """WaveNet's residual unit (van den Oord et al. 2016, eq. 2 and fig. 4).

    With a = x * w + bias the causal convolution, z = tanh(a[..., :G]) sigmoid(a[..., G:]), the unit
    gives x + z w_residual + bias_residual to the next one and z w_skip + bias_skip to the output.
    Sums, gates and the residual are float32 (float64 for float64), each output rounded once.
    Everything has derivatives of any order in all float arrays, and works under `vmap`.

    Args:
      x_BTC: sequences; bfloat16, float16, float32 or float64.
      w_KCF: the convolution's kernel, in x's type like the other weights; tap k of output t reads
        position t - (K - 1 - k) * dilation.
      w_residual_GC: 1x1 convolution to the next unit.
      w_skip_GS: 1x1 convolution to the output.
      dilation: distance between the positions that taps read.
      bias_F: float [F].
      bias_residual_C: float [C].
      bias_skip_S: float [S].
      segment_ids: int [B, T]: a tap counts only where its position's id is the output's (packed
        documents).
      state: [B, R, C] in x's type, the inputs before x; None is zeros. With segment ids, they are
        of the segment of x's first.
      return_state: whether to return the state after x too, of which inputs of other segments than
        the last one's are zeros.
      impl: 'reference' (the specification), 'xla' (for a CPU) or 'tpu' (Mosaic: the whole unit in
        one kernel; interpreted where there is no TPU). None takes the kernel of the TPU at hand
        where it is predicted to be faster than XLA and runs these arguments, else 'xla'.

    Returns:
      The residual output [B, T, C] and the skip output [B, T, S] in x's type; with `return_state`
      also the state to go on from.

    Raises:
      ValueError: an argument does not fit, or the implementation named cannot run these.
    """
    operands = check_gated(
        x_BTC,
        w_KCF,
        w_residual_GC,
        w_skip_GS,
        dilation=dilation,
        bias_F=bias_F,
        bias_residual_C=bias_residual_C,
        bias_skip_S=bias_skip_S,
        segment_ids=segment_ids,
        state=state,
    )
    return unit(operands, dilation, impl, return_state)


def unit(
    operands: GatedOperands,
    dilation: int,
    impl: Implementation | None,
    return_state: bool,
    axes: Axes | None = None,
) -> Outputs | tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what `gated_conv1d` does, its kernels cut over the `axes` of the mesh that is set."""
    y_BTC, skip_BTS = _chosen(impl, operands, dilation, axes)(operands, dilation)
    if not return_state:
        return y_BTC, skip_BTS
    sequence = Operands(
        operands.x_BTC[:, None], operands.w_KCF[None], segment_ids_BT=operands.segment_ids_BT
    )
    return y_BTC, skip_BTS, next_state(sequence, operands.state_BRC, reach(operands, dilation))


def _chosen(impl: Implementation | None, operands: GatedOperands, dilation: int, axes: Axes | None):
    """The function that runs these operands."""
    plain = {'reference': reference, 'xla': xla}
    if impl in plain:
        return plain[impl]
    if impl not in (None, 'tpu', 'gpu'):
        raise ValueError(
            f"impl={impl!r}: must be 'reference', 'xla', 'tpu', 'gpu' or None; try impl='xla'"
        )
    if impl == 'gpu':
        raise ValueError("impl='gpu': has no kernel of the gated unit; try impl='xla'")
    if impl is None:
        chip = current_chip()
        if chip is None or not gated_wins(operands, chip):
            return xla
    parts = axes and sharded(axes, operands, _kernels())
    passes = parts or _kernels()
    if reason := passes.refuses(operands, dilation):
        if impl is None:
            return xla
        raise ValueError(f"impl='{impl}': {reason}; try impl='xla'")

    def run(operands: GatedOperands, dilation: int) -> Outputs:
        return _kernel(passes, parts.placed(operands) if parts else operands, dilation)

    return run


def _kernels() -> ModuleType:
    # Imported when it is used, like the other kernels: it takes a while.
    from pallas_kernels.conv.tpu import gated

    return gated


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2))
def _kernel(passes: Any, operands: GatedOperands, dilation: int) -> Outputs:
    """The kernels, whose two passes these are, differentiable any number of times."""
    return _forward(passes, dilation, operands)


def _kernel_fwd(passes, operands, dilation):
    return _forward(passes, dilation, operands), operands


def _kernel_bwd(passes, dilation, operands, cotangents):
    return (_backward(passes, dilation, operands, *cotangents),)


_kernel.defvjp(_kernel_fwd, _kernel_bwd)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _forward(passes, dilation, operands):
    return passes.forward(operands, dilation)


@_forward.defjvp
def _forward_jvp(passes, dilation, primals, tangents):
    pure = lambda operands: reference(operands, dilation)  # noqa: E731
    return _forward(passes, dilation, *primals), jax.jvp(pure, primals, tangents)[1]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _backward(passes, dilation, operands, dy_BTC, dskip_BTS):
    return passes.backward(operands, dilation, dy_BTC, dskip_BTS)


@_backward.defjvp
def _backward_jvp(passes, dilation, primals, tangents):
    def pure(operands, *cotangents):
        ids_BT = operands.segment_ids_BT
        floats = operands._replace(segment_ids_BT=None)
        _, vjp = jax.vjp(lambda x: reference(x._replace(segment_ids_BT=ids_BT), dilation), floats)
        return vjp(cotangents)[0]

    return _backward(passes, dilation, *primals), jax.jvp(pure, primals, tangents)[1]
