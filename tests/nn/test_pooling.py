"""Pooling: the faster forms against lax.reduce_window, ties included; windows of all kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax.nn.pooling import (
    adaptive_avg_pool,
    avg_pool,
    ceil_padding,
    global_avg_pool,
    max_pool,
)


def _both(x, g, other='blocks', **kwargs):
    results = []
    for impl in ('xla', other):
        y, vjp = jax.vjp(lambda x, impl=impl: max_pool(x, impl=impl, **kwargs), x)
        results.append((y, vjp(g)[0]))
    return results


def test_blocks_equal_reduce_window_with_ties():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        # Few distinct values: most windows hold several maxima.
        x = jnp.asarray(rng.integers(0, 3, (4, 6, 8, 5)), jnp.float64)
        g = jnp.asarray(rng.normal(size=(4, 3, 4, 5)))
        (y, dx), (y_blocks, dx_blocks) = _both(x, g)
    np.testing.assert_array_equal(y, y_blocks)
    np.testing.assert_array_equal(dx, dx_blocks)


@pytest.mark.parametrize(
    'kwargs',
    [
        {'strides': (1, 1), 'padding': ((1, 1), (1, 1))},
        {'strides': (2, 2), 'padding': 'CEIL'},
        {'strides': (2, 2), 'padding': ((1, 1), (0, 2))},
        {'strides': (3, 2), 'padding': 'VALID'},
    ],
)
def test_taps_equal_reduce_window_with_ties(kwargs):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.integers(-2, 2, (2, 8, 7, 3)), jnp.float64)
        shape = jax.eval_shape(lambda x: max_pool(x, window=(3, 3), impl='xla', **kwargs), x).shape
        g = jnp.asarray(rng.integers(-9, 9, shape), jnp.float64)
        (y, dx), (y_taps, dx_taps) = _both(x, g, 'taps', window=(3, 3), **kwargs)
    np.testing.assert_array_equal(y, y_taps)
    np.testing.assert_array_equal(dx, dx_taps)


def test_tied_gradient_goes_to_the_first_pixel():
    x = jnp.zeros((1, 2, 2, 1))
    dx = jax.grad(lambda x: max_pool(x, impl='blocks').sum())(x)
    np.testing.assert_array_equal(dx.ravel(), [1, 0, 0, 0])


def test_relu_and_max_pool_commute_with_their_gradients():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.integers(-2, 3, (3, 4, 4, 2)), jnp.float32)
    g = jnp.asarray(rng.normal(size=(3, 2, 2, 2)), jnp.float32)
    before, vjp_before = jax.vjp(lambda x: max_pool(jax.nn.relu(x)), x)
    after, vjp_after = jax.vjp(lambda x: jax.nn.relu(max_pool(x)), x)
    np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(vjp_before(g)[0], vjp_after(g)[0])


@pytest.mark.parametrize(
    'kwargs',
    [
        {'window': (3, 3), 'strides': (2, 2), 'padding': ((1, 1), (1, 1))},
        {'window': (2, 2), 'padding': 'SAME'},
        {},
    ],
)
def test_other_windows_take_the_largest_value(kwargs):
    x = np.random.default_rng(2).normal(size=(1, 5, 5, 1)).astype(np.float32)
    y = max_pool(jnp.asarray(x), **kwargs)
    stride = 2
    pad = 1 if 'strides' in kwargs else 0
    size = kwargs.get('window', (2, 2))[0]
    for (b, p, q, c), value in np.ndenumerate(np.asarray(y)):
        top, left = p * stride - pad, q * stride - pad
        window = x[b, max(top, 0) : top + size, max(left, 0) : left + size, c]
        assert value == window.max()


def test_blocks_refuse_odd_sizes():
    with pytest.raises(ValueError, match="impl='blocks' needs"):
        max_pool(jnp.zeros((1, 5, 4, 1)), impl='blocks')


def test_unknown_impl_is_refused():
    with pytest.raises(ValueError, match="impl='fast' is not a max-pooling"):
        max_pool(jnp.zeros((1, 4, 4, 1)), impl='fast')


def test_means():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_allclose(avg_pool(x).ravel(), [2.5, 4.5, 10.5, 12.5])
    np.testing.assert_allclose(global_avg_pool(x), [[7.5]])


def test_global_mean_is_summed_in_float32():
    x = jnp.ones((1, 64, 64, 1), jnp.bfloat16)
    y = global_avg_pool(x)
    assert y.dtype == jnp.bfloat16
    assert float(y[0, 0]) == 1.0


@pytest.mark.parametrize(
    ('size', 'window', 'out'),
    # What torch.nn.MaxPool2d(window, 2, ceil_mode=True) gives.
    [(112, 3, 56), (28, 3, 14), (14, 2, 7), (7, 2, 4), (7, 3, 3), (6, 3, 3), (3, 3, 1), (3, 1, 2),
     (4, 1, 2), (2, 3, 1), (1, 2, 1), (1, 3, 1)],
)  # fmt: skip
def test_ceil_leaves_no_pixel_out(size, window, out):
    (low, high), none = ceil_padding((size, window), (window, window), (2, 2))
    assert (low, none) == (0, (0, 0))
    assert (size + high - window) // 2 + 1 == out
    # The last window ends at the last pixel or after it, unless it would start there.
    assert (out - 1) * 2 < size
    assert (out - 1) * 2 + window >= size or window == 1


@pytest.mark.parametrize('size', [(7, 7), (6, 6), (3, 14), (1, 5), (13, 4)])
def test_adaptive_mean_covers_the_image(size):
    x = np.random.default_rng(3).normal(size=(2, *size, 3)).astype(np.float32)
    y = np.asarray(adaptive_avg_pool(jnp.asarray(x), (6, 4)))
    assert y.shape == (2, 6, 4, 3)
    for p in range(6):
        rows = slice(p * size[0] // 6, -(-(p + 1) * size[0] // 6))
        for q in range(4):
            columns = slice(q * size[1] // 4, -(-(q + 1) * size[1] // 4))
            expected = x[:, rows, columns].mean((1, 2))
            np.testing.assert_allclose(y[:, p, q], expected, rtol=1e-5, atol=1e-6)
