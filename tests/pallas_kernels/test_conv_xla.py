"""Convolution on a CPU: every form against the specification, its rounding, and the choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import implementations
from pallas_kernels.chip import CHIPS
from pallas_kernels.conv import choice, conv1d, conv2d, reference, xla, xla_form
from pallas_kernels.conv.arguments import Operands, Spec
from pallas_kernels.conv.checks import check_conv2d

FORMS = {name: form for name, form in vars(xla_form).items() if isinstance(form, xla_form.Form)}


def images(shape, seed=0, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def run(form, x, w, du, spec):
    u, kept = form.forward(x, w, spec)
    return u, *form.gradients(du, x, w, spec, kept)


def specified(x, w, du, spec):
    operands = Operands(x, w)
    gradients = (reference.input_gradient, reference.weight_gradient)
    u = reference.convolution(operands, spec)
    return u, *(gradient(du, operands, spec) for gradient in gradients)


def agree(name, x_shape, w_shape, *, batch=2, **features):
    """Holds a form in float64 against the specification."""
    with jax.enable_x64(True):
        x, w = images((batch, *x_shape)), images(w_shape, 1)
        _, spec = check_conv2d(x, w, **features)
        du = images((batch, *spec.out_size(x_shape[:2], w_shape[:2]), w_shape[3]), 2)
        expected = specified(x, w, du, spec)
        for a, b in zip(run(FORMS[name], x, w, du, spec), expected, strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ('size', 'kernel', 'stride', 'padding', 'dilation'),
    [
        ((4, 4), (3, 3), 1, 'SAME', 1),
        ((8, 6), (3, 3), 2, ((1, 1), (1, 1)), 1),
        ((5, 4), (3, 3), 2, 'SAME', 1),
        ((6, 6), (1, 1), 2, 'VALID', 1),
        ((7, 5), (3, 2), 1, 'VALID', 2),
        ((1, 1), (3, 3), 1, 'SAME', 1),
        ((2, 9), (7, 7), 2, ((3, 3), (3, 3)), 1),
        ((6, 7), (3, 3), (2, 3), ((4, 1), (0, 5)), (1, 3)),
    ],
)
@pytest.mark.parametrize('name', ['TAPS', 'DEPTHWISE'])
def test_sums_over_positions_equal_the_specification(name, size, kernel, stride, padding, dilation):
    features = {'stride': stride, 'padding': padding, 'dilation': dilation}
    if name == 'DEPTHWISE':
        agree(name, (*size, 3), (*kernel, 1, 6), **features, groups=3)
    else:
        agree(name, (*size, 3), (*kernel, 3, 4), **features)


@pytest.mark.parametrize('size', [(4, 4), (8, 8), (7, 6), (1, 9)])
def test_winograd_equals_the_specification(size):
    agree('WINOGRAD', (*size, 3), (3, 3, 3, 4))


def test_the_backward_sums_equal_the_specification():
    pads = ((1, 1), (1, 1))
    agree('TAPS_BACKWARD', (6, 6, 3), (3, 3, 3, 4), stride=2, padding=pads)


@pytest.mark.parametrize('stride', [1, 2])
def test_gradients_in_parts_equal_the_specification_when_the_last_part_is_short(stride):
    agree('LAX_IN_PARTS', (6, 5, 3), (3, 3, 3, 4), batch=19, stride=stride)


def test_groups_equal_the_specification():
    agree('GROUPED', (6, 5, 6), (3, 3, 2, 9), groups=3, stride=2, dilation=2)


def test_columns_beyond_a_chunk_are_summed_too():
    for columns in (64, 65, 190):
        agree('DEPTHWISE', (2, columns, 2), (1, 3, 1, 2), groups=2, stride=(1, 2))


@pytest.mark.slow
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_sums_over_positions_equal_the_specification_for_any_shape(data):
    draw = data.draw
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    pads = draw(st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 2))
    over = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    low = [max(1, n - sum(p)) for n, p in zip(over, pads, strict=True)]
    size = draw(st.tuples(st.integers(low[0], 8), st.integers(low[1], 8)))
    features = {'stride': stride, 'padding': pads, 'dilation': dilation}
    agree('TAPS', (*size, 2), (*kernel, 2, 3), **features)
    agree('DEPTHWISE', (*size, 2), (*kernel, 1, 4), **features, groups=2)


def test_winograd_rounds_no_more_than_xla():
    # A larger tile, F(4×4, 3×3), misses this by more than three times.
    spec = Spec(padding=((1, 1), (1, 1)))
    with jax.enable_x64(True):
        shapes = (2, 8, 8, 64), (3, 3, 64, 64), (2, 8, 8, 64)
        x, w, du = (images(shape, seed) for seed, shape in enumerate(shapes))
        exact = specified(x, w, du, spec)
        single = (a.astype(jnp.float32) for a in (x, w, du))
        for a, b in zip(run(FORMS['WINOGRAD'], *single, spec), exact, strict=True):
            assert a.dtype == jnp.float32
            assert float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) < 5e-7


CHOICES = [
    (8, 64, 3, {}, 'WINOGRAD'),
    (4, 64, 3, {'stride': 2}, 'TAPS'),
    (8, 64, 3, {'stride': 2}, 'TAPS_BACKWARD'),
    (8, 64, 1, {'stride': 2}, 'TAPS'),
    (7, 64, 3, {}, 'LAX_IN_PARTS'),
    (8, 4, 3, {}, 'LAX_IN_PARTS'),
    (8, 4, 1, {}, 'TAPS'),
    (8, 72, 5, {}, 'LAX'),
    (8, 64, 3, {'dilation': 2}, 'LAX'),
    (8, 64, 3, {'groups': 64}, 'DEPTHWISE'),
    (8, 64, 3, {'groups': 4}, 'GROUPED'),
]


@pytest.mark.parametrize(
    ('size', 'channels', 'kernel', 'features', 'name'),
    [(*choice, ) for choice in CHOICES],
    ids=['-'.join([n, *f]) + f'-{s}-{c}-{k}' for s, c, k, f, n in CHOICES],
)  # fmt: skip
def test_the_choice_is_made_by_shape_and_is_what_runs(size, channels, kernel, features, name):
    x = images((18, size, size, channels), dtype=np.float32)
    w = images((kernel, kernel, channels // features.get('groups', 1), channels), 1, np.float32)
    features = {**features, 'padding': ((kernel // 2 * features.get('dilation', 1),) * 2,) * 2}
    _, spec = check_conv2d(x, w, **features)
    assert xla_form.form(x, w, spec) == FORMS[name]
    function = lambda x, w: conv2d(x, w, **features, impl='xla')  # noqa: E731

    @jax.jit
    def public(x, w):
        y, vjp = jax.vjp(function, x, w)
        return y, *vjp(y)

    got = public(x, w)
    by_form = jax.jit(lambda x, w, du: run(FORMS[name], x, w, du, spec))(x, w, got[0])
    for a, b in zip(got, by_form, strict=True):
        assert float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) < 1e-6
    for a, b in zip(got, specified(x, w, got[0], spec), strict=True):
        assert float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) < 1e-5


@pytest.mark.parametrize(
    ('dtype', 'groups', 'name'),
    [('bfloat16', 1, 'LAX'), ('bfloat16', 64, 'DEPTHWISE'), ('float16', 2, 'GROUPED')],
)
def test_other_types_than_float32_take_the_plain_forms(dtype, groups, name):
    x, w = jnp.zeros((2, 8, 8, 64), dtype), jnp.zeros((3, 3, 64 // groups, 64), dtype)
    assert xla_form.form(x, w, Spec(padding=((1, 1), (1, 1)), groups=groups)) == FORMS[name]


@pytest.mark.parametrize('groups', [1, 64])
def test_off_the_cpu_it_is_xlas_own_convolution_once(monkeypatch, groups):
    operands = Operands(jnp.zeros((2, 8, 8, 64)), jnp.zeros((3, 3, 64 // groups, 64)))
    spec = Spec(padding=((1, 1), (1, 1)), groups=groups)

    def own():
        """Returns how often it is called; the function is new, for traces are kept by function."""
        traced = jax.make_jaxpr(lambda: xla.forward(operands, spec)[0])()
        return str(traced).count('= conv_general_dilated')

    assert own() == 0
    monkeypatch.setattr(xla, 'accelerator', lambda: 'TPU v6 lite')
    assert own() == 1


class Kernel:
    """An implementation that takes what has a bias."""

    @staticmethod
    def refuses(operands, spec):
        return 'has no bias' if operands.bias_O is None else None


@pytest.mark.parametrize(
    ('chip', 'wins', 'bias', 'taken'),
    [
        (None, True, True, 'xla'),
        ('v6e', True, True, 'tpu'),
        ('v6e', False, True, 'xla'),
        ('v6e', True, False, 'xla'),
        ('h100', True, True, 'gpu'),
    ],
)
def test_none_takes_the_kernel_of_the_chip_where_it_wins_and_runs(
    monkeypatch, chip, wins, bias, taken
):
    asked = []
    monkeypatch.setattr(implementations, 'current_chip', lambda: CHIPS.get(chip))
    monkeypatch.setattr(choice, 'wins', lambda operands, spec, on: asked.append(on) or wins)

    def implementation(op, name):
        asked.append(name)
        return xla if name == 'xla' else Kernel

    monkeypatch.setattr(implementations, 'implementation', implementation)
    x, w = jnp.zeros((1, 4, 4, 2)), jnp.zeros((1, 1, 2, 2))
    operands, spec = check_conv2d(x, w, bias=jnp.zeros(2) if bias else None)
    module = choice.chosen(None, operands, spec)
    assert module is (xla if taken == 'xla' else Kernel)
    assert asked[-1] == taken
    assert chip is None or asked[0] is CHIPS[chip]


@pytest.mark.parametrize(('batch', 'channels'), [(1, 64), (2, 64), (2, 16)])
@pytest.mark.parametrize('length', [1, 4])
def test_a_dense_sequence_in_steps_has_the_bits_of_the_whole(length, batch, channels):
    x = images((batch, 32, channels), dtype=np.float32)
    w = images((3, channels, 64), 1, np.float32)
    step = jax.jit(
        lambda x, state: conv1d(x, w, padding='CAUSAL', state=state, return_state=True, impl='xla')
    )
    whole = jax.jit(lambda x: conv1d(x, w, padding='CAUSAL', impl='xla'))(x)
    state, parts = jnp.zeros((batch, 2, channels)), []
    for t in range(0, 32, length):
        y, state = step(x[:, t : t + length], state)
        parts.append(y)
    np.testing.assert_array_equal(jnp.concatenate(parts, 1), whole)
