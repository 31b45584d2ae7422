"""The loops of Elman, LSTM and GRU against plain scans in float64, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads

from bigjax.nn.elman import elman_scan
from bigjax.nn.gru import gru_scan
from bigjax.nn.lstm import lstm_scan

B, T, H = 3, 6, 4
SCANS = {'elman': elman_scan, 'lstm': lstm_scan, 'gru': gru_scan}
# Shapes of what comes before mask and direction: z, U, biases, states.
SHAPES = {
    'elman': [(T, B, H), (H, H), (H,), (B, H)],
    'lstm': [(T, B, 4 * H), (H, 4 * H), (4 * H,), (B, H), (B, H)],
    'gru': [(T, B, 3 * H), (H, 3 * H), (3 * H,), (H,), (B, H)],
}


def elman_step(z_BH, state, u_HH, b_H):
    return (jnp.tanh(z_BH + b_H[None] + state[0] @ u_HH),)


def lstm_step(z_BG, state, u_HG, b_G):
    h_BH, c_BH = state
    i, f, g, o = jnp.split(z_BG + h_BH @ u_HG + b_G[None], 4, axis=-1)
    c_BH = jax.nn.sigmoid(f) * c_BH + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c_BH), c_BH


def gru_step(z_BG, state, u_HG, b_G, b_H):
    """As PyTorch's documentation of nn.GRU has it, gates (reset, update, candidate)."""
    (h_BH,) = state
    z_r, z_v, z_n = jnp.split(z_BG + b_G[None], 3, axis=-1)
    s_r, s_v, s_n = jnp.split(h_BH @ u_HG, 3, axis=-1)
    r_BH, v_BH = jax.nn.sigmoid(z_r + s_r), jax.nn.sigmoid(z_v + s_v)
    n_BH = jnp.tanh(z_n + r_BH * (s_n + b_H[None]))
    return ((1 - v_BH) * n_BH + v_BH * h_BH,)


STEPS = {'elman': elman_step, 'lstm': lstm_step, 'gru': gru_step}


def plain(cell, arguments, mask_TB, reverse):
    """The textbook recurrence, differentiated by JAX."""
    states = 2 if cell == 'lstm' else 1
    z_TBG, *weights = arguments[:-states]

    def step(old, inputs):
        z_BG, mask_B = inputs
        new = STEPS[cell](z_BG, old, *weights)
        kept = tuple(jnp.where(mask_B[:, None], n, o) for n, o in zip(new, old, strict=True))
        return kept, kept[0]

    mask_TB = jnp.ones(z_TBG.shape[:2], bool) if mask_TB is None else mask_TB
    start = tuple(arguments[-states:])
    last, h_TBH = lax.scan(step, start, (z_TBG, mask_TB), reverse=reverse)
    return h_TBH, *last


def arguments_of(cell, dtype):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in SHAPES[cell]]


def ragged_mask():
    # Whole rows of padding, gaps inside a row and a full row.
    mask_TB = np.ones((T, B), bool)
    mask_TB[4:, 0] = False
    mask_TB[:, 1] = False
    mask_TB[2, 2] = False
    return jnp.asarray(mask_TB)


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('cell', SCANS)
def test_scan_and_its_gradient_equal_the_plain_form_in_float64(cell, masked, reverse):
    with jax.enable_x64(True):
        arguments = arguments_of(cell, jnp.float64)
        mask_TB = ragged_mask() if masked else None

        def loss(outputs):
            # Different weights for every output, the last states too.
            return sum(
                (jnp.cos(jnp.arange(y.size, dtype=jnp.float64)) * y.reshape(-1)).sum()
                for y in outputs
            )

        every = tuple(range(len(arguments)))
        ours = lambda *args: loss(SCANS[cell](*args, mask_TB, reverse))  # noqa: E731
        theirs = lambda *args: loss(plain(cell, args, mask_TB, reverse))  # noqa: E731
        (value, gradients), (expected, expected_gradients) = jax.jit(
            lambda *args: [jax.value_and_grad(f, every)(*args) for f in (ours, theirs)]
        )(*arguments)
        np.testing.assert_allclose(value, expected, rtol=1e-13)
        for ours, theirs in zip(gradients, expected_gradients, strict=True):
            assert ours.dtype == jnp.float64
            np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize('cell', SCANS)
def test_gradient_agrees_with_finite_differences(cell):
    with jax.enable_x64(True):
        run = jax.jit(lambda *args: SCANS[cell](*args, ragged_mask(), False))
        arguments = arguments_of(cell, jnp.float64)
        check_grads(run, arguments, order=1, modes=['rev'], atol=1e-6, rtol=1e-6)


def products(jaxpr):
    """Returns the number of matrix products of a program outside of its loops and inside."""
    outside, inside = 0, 0
    for equation in jaxpr.eqns:
        outside += equation.primitive.name == 'dot_general'
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, 'jaxpr')):
            if hasattr(parameter, 'jaxpr'):
                counts = products(parameter.jaxpr)
                is_loop = equation.primitive.name in ('while', 'scan')
                inside += sum(counts) if is_loop else counts[1]
                outside += 0 if is_loop else counts[0]
    return outside, inside


@pytest.mark.parametrize('cell', SCANS)
def test_each_loop_has_one_product_a_step_and_one_follows_for_all_of_u(cell):
    arguments = arguments_of(cell, jnp.float32)
    every = tuple(range(len(arguments)))
    run = jax.grad(lambda *args: SCANS[cell](*args, None, False)[0].sum(), every)
    # One in the forward loop, one in the backward loop, dU after it.
    assert products(jax.make_jaxpr(run)(*arguments).jaxpr) == (1, 2)
