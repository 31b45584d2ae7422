"""Convolution over images and sequences with its derivatives: the public functions."""

import jax

from pallas_kernels.conv.arguments import ConvBlockSizes, Padding, Pair
from pallas_kernels.conv.checks import check_conv1d, check_conv2d
from pallas_kernels.conv.choice import Implementation, chosen, implementation
from pallas_kernels.conv.differentiable import convolve
from pallas_kernels.conv.gated import gated_conv1d
from pallas_kernels.conv.sharded import shard
from pallas_kernels.conv.state import carried
from pallas_kernels.mesh import vary, varying

__all__ = [
    'ConvBlockSizes',
    'Implementation',
    'conv1d',
    'conv2d',
    'gated_conv1d',
    'implementation',
    'shard',
]


def conv2d(
    x_BHWC: jax.Array,
    w_KLDO: jax.Array,
    *,
    stride: int | Pair = 1,
    padding: Padding = 'SAME',
    dilation: int | Pair = 1,
    groups: int = 1,
    bias: jax.Array | None = None,
    activation: str | None = None,
    residual: jax.Array | None = None,
    scale_shift: tuple[jax.Array, jax.Array] | None = None,
    block_sizes: ConvBlockSizes | None = None,
    impl: Implementation | None = None,
) -> jax.Array:
    """Two-dimensional cross-correlation `activation((x * w + bias) scale + shift + residual)`.

    Sums and all that follows them are float32 (float64 for float64), rounded once to x's type.
    Everything has derivatives of any order in all float arrays, and works under `vmap`.

    Args:
      x_BHWC: images; bfloat16, float16, float32 or float64.
      w_KLDO: kernels of x's type [K, L, D = C / groups, O].
      stride: of rows and columns, or one int for both.
      padding: 'SAME' (ceil(H / stride) rows and likewise columns), 'VALID' (none), or pixels of
        zeros ((above, below), (left, right)), which may be more than the kernel reaches over.
      dilation: distance between the pixels that a kernel reads (Yu and Koltun 2016, eq. 2).
      groups: channels are cut into so many, and output channel o reads those of group
        o // (O / groups) (Krizhevsky et al. 2012); C of them is a depthwise convolution.
      bias: float [O], added to the sum.
      activation: None, 'relu', 'silu', 'gelu' (its tanh form), 'tanh' or 'sigmoid'.
      residual: [B, P, Q, O] in x's type, added before the activation (He et al. 2016, eq. 1).
      scale_shift: float [O] each: a BatchNorm whose statistics are fixed (Ioffe and Szegedy 2015,
        algorithm 2).
      block_sizes: of the kernels; None chooses by shape and chip.
      impl: 'reference' (the specification), 'xla' (XLA's own, and for a CPU faster forms), 'tpu'
        (Mosaic; interpreted where there is no TPU) or 'gpu' (Mosaic GPU). None takes the kernel of
        the chip at hand where it is predicted to be faster than XLA, else 'xla'.

    Returns:
      y_BPQO in x's type.

    Raises:
      ValueError: an argument does not fit, or the implementation named cannot run these.
    """
    operands, spec = check_conv2d(
        x_BHWC,
        w_KLDO,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=bias,
        activation=activation,
        residual=residual,
        scale_shift=scale_shift,
        block_sizes=block_sizes,
    )
    return _run(impl, operands, spec, block_sizes)


def conv1d(
    x_BTC: jax.Array,
    w_KDO: jax.Array,
    *,
    stride: int = 1,
    padding: str | Pair = 'SAME',
    dilation: int = 1,
    groups: int = 1,
    bias: jax.Array | None = None,
    activation: str | None = None,
    segment_ids: jax.Array | None = None,
    state: jax.Array | None = None,
    return_state: bool = False,
    block_sizes: ConvBlockSizes | None = None,
    impl: Implementation | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """One-dimensional cross-correlation over sequences, `activation(x * w + bias)`.

    Types, derivatives and `vmap` as in `conv2d`.

    Args:
      x_BTC: sequences; bfloat16, float16, float32 or float64.
      w_KDO: kernels of x's type [K, D = C / groups, O].
      stride: distance between two outputs.
      padding: 'SAME', 'VALID', 'CAUSAL' (output t reads inputs up to t * stride; van den Oord et
        al. 2016, §2.1) or zeros (before, after).
      dilation: distance between the positions that a kernel reads.
      groups: as in `conv2d`.
      bias: float [O], added to the sum.
      activation: None, 'relu', 'silu', 'gelu' (its tanh form), 'tanh' or 'sigmoid'.
      segment_ids: int [B, T]: an output reads inputs of its own id only (packed documents); for
        stride 1 and paddings that keep the length.
      state: [B, (K - 1) * dilation, C] in x's type, the inputs before x, for 'CAUSAL'; None is
        zeros. With segment ids, they are of the segment of x's first.
      return_state: whether to return the state after x too, of which inputs of other segments than
        the last one's are zeros.
      block_sizes: of the kernels; None chooses by shape and chip.
      impl: as in `conv2d`.

    Returns:
      y_BTO in x's type, its length as padding and stride make it; with `return_state` also the
      state to go on from. In float32, sums have the same bits in steps as in the whole sequence,
      and so have their activations, but on a CPU for all but relu: the last bits of an exponential
      depend there on its place in the array.

    Raises:
      ValueError: an argument does not fit, or the implementation named cannot run these.
    """
    operands, spec = check_conv1d(
        x_BTC,
        w_KDO,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=bias,
        activation=activation,
        segment_ids=segment_ids,
        state=state,
        return_state=return_state,
        block_sizes=block_sizes,
    )
    run = lambda operands, spec: _run(impl, operands, spec, block_sizes)  # noqa: E731
    return carried(run, operands, spec, state, return_state)


def _run(impl, operands, spec, block_sizes) -> jax.Array:
    # In a `jax.shard_map` that checks types, a gradient has the type of what it is the gradient of.
    operands = vary(operands, varying(operands))
    return convolve(chosen(impl, operands, spec), operands, spec, block_sizes)
