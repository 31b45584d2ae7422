"""Rotary positions: scores depend on distance alone; the scaling leaves what turns often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax.nn.rotary import RotaryScaling, frequencies, rotate, rotation


def test_frequencies_fall_from_one_in_equal_ratios():
    frequency_F = frequencies(8, 10_000.0)
    np.testing.assert_allclose(frequency_F, [1, 0.1, 0.01, 0.001], rtol=1e-6)
    assert frequency_F.dtype == np.float32


def test_scores_depend_on_the_distance_alone(key):
    q_D, k_D = jax.random.normal(key, (2, 8))

    def score(t, s):
        turned = rotation(jnp.array([[t, s]]), frequencies(8, 100.0))
        q_BTHD, k_BTHD = (rotate(x_D[None, None, None].repeat(2, 1), turned) for x_D in (q_D, k_D))
        return float(jnp.vdot(q_BTHD[0, 0, 0], k_BTHD[0, 1, 0]))

    assert score(7, 3) == pytest.approx(score(24, 20), rel=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), rel=1e-2)
    assert score(0, 0) == pytest.approx(float(jnp.vdot(q_D, k_D)), rel=1e-5)


def test_rotation_keeps_lengths_and_type(key):
    x_BTHD = jax.random.normal(key, (2, 3, 2, 4))
    turned = rotation(jnp.arange(3)[None], frequencies(4, 100.0))
    lengths = jnp.linalg.norm(rotate(x_BTHD, turned), axis=-1)
    np.testing.assert_allclose(lengths, jnp.linalg.norm(x_BTHD, axis=-1), rtol=1e-5)
    assert rotate(x_BTHD.astype(jnp.bfloat16), turned).dtype == jnp.bfloat16


def test_pairs_are_the_halves_of_a_head():
    x_BTHD = jnp.array([1.0, 0, 0, 0])[None, None, None]
    turned = rotation(jnp.array([[1]]), frequencies(4, 100.0))
    want = [np.cos(1), 0, np.sin(1), 0]
    np.testing.assert_allclose(rotate(x_BTHD, turned)[0, 0, 0], want, atol=1e-6)


def test_scaling_divides_slow_frequencies_and_leaves_fast_ones():
    scaling = RotaryScaling(factor=8.0, low=1.0, high=4.0, original=8192)
    plain_F = frequencies(128, 500_000.0)
    scaled_F = frequencies(128, 500_000.0, scaling)
    turns_F = 8192 * plain_F / (2 * np.pi)
    np.testing.assert_array_equal(scaled_F[turns_F > 4], plain_F[turns_F > 4])
    np.testing.assert_allclose(scaled_F[turns_F < 1], plain_F[turns_F < 1] / 8, rtol=1e-6)
    between = (turns_F > 1) & (turns_F < 4)
    assert between.any()
    # Llama 3.1's own formula for the passage.
    smooth_F = (turns_F - 1) / 3
    want_F = (1 - smooth_F) * plain_F / 8 + smooth_F * plain_F
    np.testing.assert_allclose(scaled_F[between], want_F[between], rtol=1e-5)
    np.testing.assert_array_equal(frequencies(128, 500_000.0, RotaryScaling()), plain_F)
