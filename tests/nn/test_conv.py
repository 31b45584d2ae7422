"""Convolution: every form against XLA's, and each written-out gradient in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigjax.nn.conv import Conv, conv, conv_flops


def _images(shape, seed=0, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _value_and_gradients(impl, x, w, g, strides, padding):
    def f(x, w):
        return conv(x, w, strides=strides, padding=padding, impl=impl)

    y, vjp = jax.vjp(f, x, w)
    return y, *vjp(g)


def _agree(x_shape, w_shape, strides, padding, impl='taps'):
    with jax.enable_x64(True):
        x, w = _images(x_shape), _images(w_shape, 1)
        y = conv(x, w, strides=strides, padding=padding, impl='xla')
        g = _images(y.shape, 2)
        expected = _value_and_gradients('xla', x, w, g, strides, padding)
        got = _value_and_gradients(impl, x, w, g, strides, padding)
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ('size', 'kernel', 'stride', 'padding'),
    [
        ((4, 4), (3, 3), 1, 'SAME'),
        ((8, 6), (3, 3), 2, ((1, 1), (1, 1))),
        ((5, 4), (3, 3), 2, 'SAME'),
        ((6, 6), (1, 1), 2, 'VALID'),
        ((7, 5), (3, 2), 1, 'VALID'),
        ((1, 1), (3, 3), 1, 'SAME'),
        ((2, 9), (7, 7), 2, ((3, 3), (3, 3))),
    ],
)
def test_taps_equal_xla_with_gradients(size, kernel, stride, padding):
    _agree((2, *size, 3), (*kernel, 3, 4), (stride, stride), padding)


@pytest.mark.parametrize('size', [(4, 4), (8, 8), (7, 6), (1, 9)])
def test_winograd_equals_xla_with_gradients(size):
    _agree((2, *size, 3), (3, 3, 3, 4), (1, 1), 'SAME', impl='winograd')


def test_winograd_rounds_no_more_than_xla():
    # A larger tile, F(4×4, 3×3), misses this by more than three times.
    with jax.enable_x64(True):
        shapes = (2, 8, 8, 64), (3, 3, 64, 64), (2, 8, 8, 64)
        x, w, g = (_images(shape, seed) for seed, shape in enumerate(shapes))
        exact = _value_and_gradients('xla', x, w, g, (1, 1), 'SAME')
        single = (a.astype(jnp.float32) for a in (x, w, g))
        got = _value_and_gradients('winograd', *single, (1, 1), 'SAME')
        for a, b in zip(got, exact, strict=True):
            assert a.dtype == jnp.float32
            assert float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) < 5e-7


@pytest.mark.parametrize(
    ('kernel', 'stride', 'padding'), [(5, 1, 'SAME'), (3, 2, 'SAME'), (3, 1, 'VALID')]
)
def test_winograd_refuses_other_convolutions(kernel, stride, padding):
    x, w = jnp.zeros((1, 8, 8, 2)), jnp.zeros((kernel, kernel, 2, 2))
    with pytest.raises(ValueError, match="impl='winograd' needs a 3×3 kernel"):
        conv(x, w, strides=(stride, stride), padding=padding, impl='winograd')


def test_taps_grad_equals_xla_with_gradients():
    _agree((2, 6, 6, 3), (3, 3, 3, 4), (2, 2), ((1, 1), (1, 1)), impl='taps_grad')


@pytest.mark.parametrize('stride', [1, 2])
def test_split_grad_equals_xla_with_gradients_when_the_last_part_is_short(stride):
    _agree((19, 6, 5, 3), (3, 3, 3, 4), (stride, stride), 'SAME', impl='split_grad')


@pytest.mark.parametrize(
    ('size', 'channels', 'kernel', 'stride', 'form'),
    [
        (8, 64, 3, 1, 'winograd'),
        (4, 64, 3, 2, 'taps'),
        (8, 64, 3, 2, 'taps_grad'),
        (8, 64, 1, 2, 'taps'),
        (7, 64, 3, 1, 'split_grad'),
        (8, 4, 3, 1, 'split_grad'),
        (8, 4, 1, 1, 'taps'),
    ],
)
def test_the_choice_is_made_by_shape_and_agrees_with_xla(size, channels, kernel, stride, form):
    x = _images((18, size, size, channels), dtype=np.float32)
    w = _images((kernel, kernel, channels, channels), 1, np.float32)
    pads = ((kernel // 2, kernel // 2),) * 2

    def value_and_gradients(impl):
        def f(x, w):
            return conv(x, w, strides=(stride, stride), padding=pads, impl=impl)

        y, vjp = jax.vjp(f, x, w)
        return y, *vjp(y)

    chosen, plain = value_and_gradients(None), value_and_gradients('xla')
    # The forms round differently, so equal bits show which one was chosen.
    for a, b in zip(chosen, value_and_gradients(form), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(chosen, plain, strict=True):
        assert float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) < 1e-5
    assert not all(np.array_equal(a, b) for a, b in zip(chosen, plain, strict=True))


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_taps_equal_xla_for_any_shape(data):
    draw = data.draw
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    strides = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    pads = draw(st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 2))
    low = [max(1, k - sum(p)) for k, p in zip(kernel, pads, strict=True)]
    size = draw(st.tuples(st.integers(low[0], 7), st.integers(low[1], 7)))
    _agree((2, *size, 2), (*kernel, 2, 3), strides, pads)


def test_unknown_impl_is_refused():
    x, w = jnp.zeros((1, 4, 4, 2)), jnp.zeros((3, 3, 2, 2))
    with pytest.raises(ValueError, match="impl='fft' is not a convolution"):
        conv(x, w, impl='fft')


def test_channel_mismatch_is_refused():
    with pytest.raises(ValueError, match='the same C'):
        conv(jnp.zeros((1, 4, 4, 2)), jnp.zeros((3, 3, 3, 2)))


def test_layer_computes_in_dtype_and_keeps_float32_parameters():
    layer = Conv(5, dtype=jnp.bfloat16)
    x = jnp.ones((2, 4, 4, 3))
    variables = layer.init(jax.random.key(0), x)
    assert layer.apply(variables, x).dtype == jnp.bfloat16
    assert {v.dtype for v in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
    assert variables['params']['kernel'].shape == (3, 3, 3, 5)


def test_bias_is_added_to_every_pixel():
    layer = Conv(2, kernel_size=(1, 1))
    x = _images((1, 2, 2, 3), dtype=np.float32)
    params = layer.init(jax.random.key(0), x)['params']
    shifted = {**params, 'bias': params['bias'] + jnp.asarray([1.0, -2.0])}
    moved = layer.apply({'params': shifted}, x) - layer.apply({'params': params}, x)
    np.testing.assert_allclose(moved, jnp.broadcast_to(jnp.array([1.0, -2.0]), moved.shape), 1e-6)


def test_flops_count_two_per_multiply_add():
    # 5×5 image, stride 2: 3×3 outputs of 3·3·2 multiply-adds for each of 4 features.
    flops, size = conv_flops((5, 5), 2, 4, strides=(2, 2))
    assert (flops, size) == (2 * 9 * 18 * 4, (3, 3))
    # With two rows of padding above alone, 3 × 2 outputs.
    flops, size = conv_flops((5, 5), 2, 4, strides=(2, 2), padding=((2, 0), (0, 0)))
    assert (flops, size) == (2 * 6 * 18 * 4, (3, 2))
