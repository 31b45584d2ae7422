"""What the schedule tool compiles for a convolution: the kernels here and XLA's own beside them.

Legend: B batch, H W input rows and columns, K L kernel rows and columns, P Q output rows and
columns, C input channels, G groups, D = C / G, O output channels, T positions, S skip channels.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.chip import Chip
from pallas_kernels.conv.arguments import Operands, Spec, span
from pallas_kernels.conv.checks import check_padding
from pallas_kernels.conv.gated_arguments import GatedOperands
from pallas_kernels.schedule_work import OURS, Work

RIVALS = ('xla',)
OPS = ('conv2d', 'conv1d', 'gated_conv1d')
PASSES = ('forward', 'input', 'weight', 'all')
EPILOGUES = ('bias', 'scale_shift', 'residual', 'relu', 'silu', 'gelu', 'tanh', 'sigmoid')
LAYOUTS = ('free', 'default')
RESULTS = ('y', 'y_skip')


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a convolution; a conv1d has one row.

    Attributes:
      op: of `OPS`.
      batch, rows, cols, channels: B, H, W (or T) and C.
      kernel_rows, kernel_cols, features: K, L and O (gated: both halves).
      stride, dilation: of rows and columns alike.
      groups: of the channels.
      padding: 'SAME', 'VALID', 'CAUSAL' or 'before,after' of every dimension.
      passes: of `PASSES`: the forward pass, the gradient of the input or of the kernel alone, or
        all three.
      epilogue: of `EPILOGUES`, joined by commas.
      segments: whether packed segments' ids are given.
      skip: channels of a gated unit's skip output, 0 for as many as the input's.
      dtype: of all arrays but the ids.
      layouts: 'free' lets the compiler choose those of arguments and results, as it may between
        the layers of a network.
    """

    op: str
    batch: int
    rows: int
    cols: int
    channels: int
    kernel_rows: int
    kernel_cols: int
    features: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    padding: str = 'SAME'
    passes: str = 'forward'
    epilogue: str = ''
    segments: bool = False
    skip: int = 0
    dtype: str = 'bfloat16'
    layouts: str = 'free'

    def __str__(self) -> str:
        rows = [self.rows] if self.op == 'conv2d' else []
        kernel_rows = [self.kernel_rows] if self.op == 'conv2d' else []
        words = [self.op, 'x'.join(map(str, [self.batch, *rows, self.cols, self.channels]))]
        words.append('kernel ' + 'x'.join(map(str, [*kernel_rows, self.kernel_cols])))
        words.append(f'features {self.features}')
        for name, usual in (('stride', 1), ('dilation', 1), ('groups', 1), ('epilogue', '')):
            if (value := getattr(self, name)) != usual:
                words.append(f'{name} {value}')
        words += [] if self.padding == 'SAME' else [self.padding]
        words += ['segments'] if self.segments else []
        words.append('forward + backward' if self.passes == 'all' else self.passes)
        return ' '.join([*words, self.dtype, f'{self.layouts} layouts'])

    @property
    def pads(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Zeros before and after the rows and the columns."""
        spans = span(self.kernel_rows, self.dilation), span(self.kernel_cols, self.dilation)
        if self.padding == 'CAUSAL':
            return (0, 0), (spans[1] - 1, 0)
        if self.padding in ('SAME', 'VALID'):
            strides = (self.stride, self.stride)
            return check_padding(self.padding, (self.rows, self.cols), spans, strides)
        before, after = map(int, self.padding.split(','))
        return ((before, after) if self.op == 'conv2d' else (0, 0)), (before, after)

    @property
    def spec(self) -> Spec:
        """What is static, as the public function makes it: in one row nothing strides."""
        one = self.op != 'conv2d'
        strides, dilations = (
            (1 if one else value, value) for value in (self.stride, self.dilation)
        )
        return Spec(strides, self.pads, dilations, self.groups, self.activation)

    @property
    def out_size(self) -> tuple[int, int]:
        """P and Q."""
        sizes = (self.rows, self.cols), (self.kernel_rows, self.kernel_cols)
        return self.spec.out_size(*sizes)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the arrays by name: x, w, what the epilogue takes, then y."""
        B, C, features = self.batch, self.channels, self.features
        P, Q = self.out_size
        if self.op == 'conv2d':
            found = {
                'x': (B, self.rows, self.cols, C),
                'w': (self.kernel_rows, self.kernel_cols, C // self.groups, features),
            }
            y = (B, P, Q, features)
        else:
            found = {'x': (B, self.cols, C), 'w': (self.kernel_cols, C // self.groups, features)}
            y = (B, Q, features)
        if self.op == 'gated_conv1d':
            skip = self.skip or C
            found |= {'w_residual': (features // 2, C), 'w_skip': (features // 2, skip)}
            return found | {'y': (B, Q, C), 'y_skip': (B, Q, skip)}
        words = self.epilogue.split(',')
        if 'bias' in words:
            found['bias'] = (features,)
        if 'scale_shift' in words:
            found |= {'scale': (features,), 'shift': (features,)}
        if 'residual' in words:
            found['residual'] = y
        return found | {'y': y}

    @property
    def activation(self) -> str | None:
        """The epilogue's activation."""
        words = [word for word in self.epilogue.split(',') if word]
        return next((w for w in words if w not in ('bias', 'scale_shift', 'residual')), None)


def work(case: Case, chip: Chip) -> Work:
    """The least work of a case on `chip`: every tap of every output, edges counted as inside."""
    del chip  # a contraction over taps and channels can fill the MXU's side whatever C is
    P, Q = case.out_size
    places = case.batch * P * Q
    taps = case.kernel_rows * case.kernel_cols * case.channels // case.groups
    flops = 2 * places * taps * case.features
    item = jnp.dtype(case.dtype).itemsize
    shapes = case.shapes
    sizes = {name: item * functools.reduce(int.__mul__, shape) for name, shape in shapes.items()}
    if case.op == 'gated_conv1d':
        flops += 2 * places * (case.features // 2) * (case.channels + shapes['y_skip'][-1])
    ids = 4 * case.batch * case.cols if case.segments else 0
    results = sum(size for name, size in sizes.items() if name in RESULTS)
    given = sum(sizes.values()) - results
    # The backward pass reads what the forward pass read, and dy, and writes all gradients.
    both = 3 * given + 2 * results + 2 * ids
    one = sizes['x'] + sizes['w'] + results + ids
    least = {
        'forward': (flops, given + results + ids),
        'input': (flops, one),
        'weight': (flops, one),
        'all': (3 * flops, both),
    }
    flops, hbm = least[case.passes]
    return Work(flops, flops, hbm)


def build(request: dict[str, Any]) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
    """The function to compile, its arguments' shapes, and what its builder chose.

    `request['impl']` names another implementation here than the TPU's.
    """
    case = Case(**request['case'])
    sizes = dict(request.get('config') or {})
    ours = request['side'] == OURS
    impl = request.get('impl', 'tpu' if ours else 'xla')
    forward = functools.partial(_ours if ours else _xla, case, impl, sizes)
    dtype = jnp.dtype(case.dtype)
    specs = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in case.shapes.items()}
    dy = tuple(specs.pop(name) for name in RESULTS if name in specs)
    if case.segments:
        specs['segment_ids'] = jax.ShapeDtypeStruct((case.batch, case.cols), jnp.int32)
    if case.passes == 'forward':
        return forward, [specs], sizes
    wanted = {'input': ['x'], 'weight': ['w']}.get(case.passes)

    def backward(given, dy):
        varied = {n: given[n] for n in wanted or given if n != 'segment_ids'}
        y, vjp = jax.vjp(lambda varied: forward(given | varied), varied)
        gradients = vjp(dy if len(dy) > 1 else dy[0])
        return gradients if wanted else (y, gradients)

    return backward, [specs, dy], sizes


def operands(case: Case) -> tuple[Operands, Spec]:
    """Shapes and specification of a conv2d or conv1d, as the kernels' files take them."""
    shapes = case.shapes
    if case.op == 'conv1d':  # of one row
        shapes |= {n: (s[0], 1, *s[1:]) for n, s in shapes.items() if n in ('x', 'residual')}
        shapes['w'] = (1, *shapes['w'])
    names = ('x', 'w', 'bias', 'scale', 'shift', 'residual')
    dtype = jnp.dtype(case.dtype)
    arrays = [jax.ShapeDtypeStruct(shapes[n], dtype) if n in shapes else None for n in names]
    ids = jax.ShapeDtypeStruct((case.batch, case.cols), jnp.int32) if case.segments else None
    return Operands(*arrays, ids), case.spec


def gated_operands(case: Case) -> GatedOperands:
    """Shapes of a gated unit, as its kernel's files take them."""
    names, dtype = ('x', 'w', 'w_residual', 'w_skip'), jnp.dtype(case.dtype)
    return GatedOperands(*[jax.ShapeDtypeStruct(case.shapes[n], dtype) for n in names])


def chosen(case: Case, chip: Chip) -> dict[str, Any]:
    """Nothing: every kernel chooses its block sizes itself."""
    del case, chip
    return {}


def _ours(case: Case, impl: str, sizes: dict[str, Any], given: dict[str, jax.Array]) -> Any:
    """The public function with the implementation named."""
    from pallas_kernels import conv

    options: dict[str, Any] = {**given, 'dilation': case.dilation, 'impl': impl}
    x, w = options.pop('x'), options.pop('w')
    if case.op == 'gated_conv1d':
        weights = options.pop('w_residual'), options.pop('w_skip')
        return conv.gated_conv1d(x, w, *weights, **options)
    options |= {'stride': case.stride, 'groups': case.groups, 'activation': case.activation}
    if sizes:
        options['block_sizes'] = conv.ConvBlockSizes(**sizes)
    if case.op == 'conv1d':
        return conv.conv1d(x, w, padding=case.pads[1], **options)
    if 'scale' in options:
        options['scale_shift'] = options.pop('scale'), options.pop('shift')
    return conv.conv2d(x, w, padding=case.pads, **options)


def _xla(case: Case, impl: str, sizes: dict[str, Any], given: dict[str, jax.Array]) -> Any:
    """What a layer would write without a library."""
    if case.epilogue or case.segments:
        return _ours(case, impl, sizes, given)
    space = 'HW' if case.op == 'conv2d' else 'H'
    rank = len(space)
    y = jax.lax.conv_general_dilated(
        given['x'], given['w'], (case.stride,) * rank, case.pads[-rank:],
        rhs_dilation=(case.dilation,) * rank, feature_group_count=case.groups,
        dimension_numbers=(f'N{space}C', f'{space}IO', f'N{space}C'),
    )  # fmt: skip
    if case.op != 'gated_conv1d':
        return y
    z = jnp.tanh(y[..., : case.features // 2]) * jax.nn.sigmoid(y[..., case.features // 2 :])
    return given['x'] + z @ given['w_residual'], z @ given['w_skip']
