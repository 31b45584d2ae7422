"""Cases of convolutions: features in all pairs, their inputs, and the rule for errors.

The rule is that of attention: an implementation may err twice as much as the same computation in
plain XLA of the same precision does, both measured against float64, and a little.

Legend: B batch, H W rows and columns, K L kernel rows and columns, P Q output rows and columns,
C channels, G groups, O output channels, T positions.
"""

import itertools
import random
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled

from pallas_kernels.conv import conv1d, conv2d, implementation
from pallas_kernels.conv.arguments import span
from pallas_kernels.conv.checks import check_conv1d, check_conv2d
from pallas_kernels.conv.state import continued

NO_GPU = pytest.mark.skipif(
    jax.default_backend() != 'gpu', reason='Mosaic GPU kernels run on a Hopper GPU only'
)
IMPLS = ('reference', 'xla', 'tpu', pytest.param('gpu', marks=NO_GPU))


class Case(NamedTuple):
    """One level of every feature of images; channels are (C, O, G)."""

    size: tuple[int, int] = (9, 11)
    kernel: tuple[int, int] = (3, 3)
    channels: tuple[int, int, int] = (8, 16, 1)
    stride: tuple[int, int] = (1, 1)
    padding: Any = 'SAME'
    dilation: tuple[int, int] = (1, 1)
    bias: bool = False
    scale: bool = False
    residual: bool = False
    activation: str | None = None
    dtype: str = 'float32'

    @property
    def fits(self) -> bool:
        """Whether there is an output."""
        return True


class Sequence(NamedTuple):
    """One level of every feature of sequences; channels are (C, O, G)."""

    length: int = 24
    kernel: int = 4
    channels: tuple[int, int, int] = (8, 8, 8)
    stride: int = 1
    padding: Any = 'CAUSAL'
    dilation: int = 1
    bias: bool = False
    activation: str | None = None
    segments: bool = False
    state: bool = False
    dtype: str = 'float32'

    @property
    def fits(self) -> bool:
        """Whether these features go together."""
        if self.state and self.padding != 'CAUSAL':
            return False
        return not self.segments or (self.stride == 1 and self.padding in ('CAUSAL', 'SAME'))


# Of these, every pair of levels that goes together occurs in `covering`.
LEVELS: dict[type, dict[str, tuple]] = {
    Case: {
        'size': ((9, 11), (16, 10)),
        'kernel': ((3, 3), (1, 1), (2, 5)),
        'channels': ((8, 16, 1), (3, 8, 1), (8, 8, 8), (6, 12, 6), (8, 24, 4)),
        'stride': ((1, 1), (2, 2), (3, 1)),
        'padding': ('SAME', 'VALID', ((1, 0), (2, 6))),
        'dilation': ((1, 1), (2, 2), (3, 1)),
        'bias': (False, True),
        'scale': (False, True),
        'residual': (False, True),
        'activation': (None, 'relu', 'gelu'),
        'dtype': ('float32', 'bfloat16'),
    },
    Sequence: {
        'length': (24, 40),
        'kernel': (4, 1, 3),
        'channels': ((8, 8, 8), (8, 16, 1), (6, 12, 6), (8, 8, 2)),
        'stride': (1, 2),
        'padding': ('CAUSAL', 'SAME', 'VALID', (3, 1)),
        'dilation': (1, 5),
        'bias': (False, True),
        'activation': (None, 'silu', 'tanh'),
        'segments': (False, True),
        'state': (False, True),
        'dtype': ('float32', 'bfloat16'),
    },
}
# And these are drawn only.
MORE: dict[type, dict[str, tuple]] = {
    Case: {
        'size': ((8, 8), (17, 9), (9, 33)),
        'kernel': ((5, 2), (4, 4)),
        'channels': ((5, 10, 5), (130, 12, 1), (4, 130, 1), (12, 6, 3), (1, 8, 1)),
        'stride': ((1, 2), (4, 4)),
        'padding': (((7, 9), (0, 0)), ((0, 1), (8, 8))),
        'dilation': ((1, 2), (2, 1)),
        'activation': ('silu', 'tanh', 'sigmoid'),
    },
    Sequence: {
        'length': (17, 130),
        'kernel': (2, 5),
        'channels': ((5, 5, 5), (3, 8, 1), (130, 130, 130), (12, 6, 3)),
        'stride': (3,),
        'padding': ((0, 9), (20, 0)),
        'dilation': (2, 4),
        'activation': ('relu', 'gelu', 'sigmoid'),
    },
}
B = 2


def pairs(case: Case | Sequence) -> set:
    """Returns every pair of features at the levels that they have here."""
    return set(itertools.combinations(zip(case._fields, case, strict=True), 2))


def possible(kind: type) -> set:
    """Returns every pair of levels of two features that goes together."""
    features = [[(name, level) for level in levels] for name, levels in LEVELS[kind].items()]
    both = {pair for two in itertools.combinations(features, 2) for pair in itertools.product(*two)}
    return {pair for pair in both if kind()._replace(**dict(pair)).fits}


def covering(kind: type) -> list:
    """Returns cases in which every pair that goes together occurs, few of them."""
    draw, left, cases = random.Random(0), possible(kind), []
    while left:
        tries = [
            kind(*(draw.choice(levels) for levels in LEVELS[kind].values())) for _ in range(300)
        ]
        # The first has a pair that is left, so that this ends.
        tries = [kind()._replace(**dict(min(left, key=repr))), *tries]
        fitting = [case for case in tries if case.fits]
        cases.append(max(fitting, key=lambda case: len(pairs(case) & left)))
        left -= pairs(cases[-1])
    return cases


def arguments(case: Case | Sequence, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a case's differentiable arrays, in its type, and its other keyword arguments."""
    draw = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(draw.normal(size=shape), case.dtype)  # noqa: E731
    C, features, G = case.channels
    others = {name: getattr(case, name) for name in ('stride', 'padding', 'dilation', 'activation')}
    others['groups'] = G
    taps = np.prod(case.kernel)
    weight = lambda *shape: (normal(*shape) / np.sqrt(taps * C / G)).astype(case.dtype)  # noqa: E731
    if isinstance(case, Sequence):
        arrays = {'x': normal(B, case.length, C), 'w': weight(case.kernel, C // G, features)}
        if case.state:
            arrays['state'] = normal(B, span(case.kernel, case.dilation) - 1, C)
        if case.segments:
            ids = np.sort(draw.integers(0, 4, (B, case.length)), axis=1)
            others['segment_ids'] = ids.astype(np.int32)
    else:
        arrays = {'x': normal(B, *case.size, C), 'w': weight(*case.kernel, C // G, features)}
        if case.scale:
            arrays |= {'scale': normal(features), 'shift': normal(features)}
        if case.residual:
            arrays['residual'] = normal(*output_shape(case))
    if case.bias:
        arrays['bias'] = normal(features)
    return arrays, others


def output_shape(case: Case | Sequence) -> tuple[int, ...]:
    """Returns the shape of the result, by another library's shape rule: JAX's own."""
    C, features, G = case.channels
    if isinstance(case, Sequence):
        over = span(case.kernel, case.dilation)
        padding = ((over - 1, 0),) if case.padding == 'CAUSAL' else case.padding
        padding = padding if isinstance(padding, str) or len(padding) == 1 else (padding,)
        spatial, kernel, stride, dilation = (
            (n,) for n in (case.length, case.kernel, case.stride, case.dilation)
        )
        numbers = ('NHC', 'HIO', 'NHC')
    else:
        spatial, kernel, stride, dilation = case.size, case.kernel, case.stride, case.dilation
        padding, numbers = case.padding, ('NHWC', 'HWIO', 'NHWC')
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    return jax.eval_shape(
        lambda x, w: jax.lax.conv_general_dilated(
            x, w, stride, padding, rhs_dilation=dilation, dimension_numbers=numbers,
            feature_group_count=G,
        ),
        shape(B, *spatial, C),
        shape(*kernel, C // G, features),
    ).shape  # fmt: skip


def cotangent(case: Case | Sequence) -> jax.Array:
    """Returns a cotangent of the result."""
    return jnp.asarray(np.random.default_rng(99).normal(size=output_shape(case)), case.dtype)


def convolve(impl: str | None, arrays: dict[str, Any], others: dict[str, Any], **more):
    """Returns conv1d or conv2d of the arrays, by the rank of x."""
    arrays = dict(arrays)
    x, w = arrays.pop('x'), arrays.pop('w')
    function = conv1d if x.ndim == 3 else conv2d
    return function(x, w, **_keywords(arrays), **others, **more, impl=impl)


def skip_refused(impl: str, arrays: dict[str, Any], others: dict[str, Any]) -> None:
    """Skips the test, with the reason, where the implementation does not take these arguments."""
    arrays = dict(arrays)
    x, w, state = arrays.pop('x'), arrays.pop('w'), arrays.get('state')
    check = check_conv1d if x.ndim == 3 else check_conv2d
    operands, spec = check(x, w, **_keywords(arrays), **others)
    if state is not None:
        operands, spec, _ = continued(operands, spec, state)
    if reason := implementation(impl).refuses(operands, spec):
        pytest.skip(f'{impl}: {reason}')


def _keywords(arrays: dict[str, Any]) -> dict[str, Any]:
    keywords = {name: x for name, x in arrays.items() if name not in ('scale', 'shift')}
    if 'scale' in arrays:
        keywords['scale_shift'] = (arrays['scale'], arrays['shift'])
    return keywords


def with_gradients(impl: str, function, arrays: dict[str, jax.Array], dy: jax.Array):
    """Returns a compiled function of nothing to y and every gradient, by name."""

    def run(arrays, dy):
        y, vjp = jax.vjp(function, arrays)
        return {'y': y, **vjp(dy)[0]}

    return compiled(impl, run, arrays, dy)


def assert_close(case: Case | Sequence, got, base, want) -> None:
    """Holds results, those of plain XLA and the oracle's against each other by the rule."""
    # A result is rounded to its type; sums in another order differ by some roundings.
    eps = max(float(jnp.finfo(case.dtype).eps), 1e-6)
    for name, exact in want.items():
        x, y = (np.asarray(out[name].astype(jnp.float32), np.float64) for out in (got, base))
        error, limit = (np.abs(z - exact).max(initial=0) for z in (x, y))
        limit = 2 * limit + eps * max(1.0, np.abs(exact).max(initial=0))
        assert error <= limit, f'{name}: error {error:.2e}, limit {limit:.2e} in {case}'
