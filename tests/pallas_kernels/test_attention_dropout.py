"""Dropout's bits: kept at the rate, independent in every direction, equal wherever computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import SEED, Case, arguments, attend
from attention_oracle import kept

from pallas_kernels.attention import dropout

SHAPE = 4, 4, 192, 256


def bits(seed, rate, shape=SHAPE, start=(0, 0, 0, 0)):
    indices = jnp.ogrid[tuple(slice(n) for n in shape)]
    indices = (jnp.asarray(i, jnp.int32) + n for i, n in zip(indices, start, strict=True))
    return np.asarray(dropout.keep(jnp.int32(seed), *indices, rate))


@pytest.mark.parametrize('seed', [0, -1, SEED])
def test_bits_are_those_of_numpy_and_of_any_part(seed):
    start = (3, 70000, 2**20, 2**30)
    whole = bits(seed, 0.3, (2, 3, 8, 12), start)
    np.testing.assert_array_equal(whole, kept(seed, 0.3, (2, 3, 8, 12), start))
    part = bits(seed, 0.3, (1, 2, 5, 4), (4, 70001, 2**20 + 3, 2**30 + 8))
    np.testing.assert_array_equal(part, whole[1:, 1:, 3:, 8:])


@pytest.mark.parametrize('rate', [0.01, 0.1, 0.5, 0.9])
def test_the_share_kept_is_one_minus_the_rate_everywhere(rate):
    x = (bits(SEED, rate) - (1 - rate)) / np.sqrt(rate * (1 - rate))
    # Means of independent bits, in standard deviations, and the spread of these means.
    assert abs(x.mean() * np.sqrt(x.size)) < 4
    for axis in (2, 3):
        means = x.mean(axis) * np.sqrt(x.shape[axis])
        assert abs((means**2).mean() - 1) < 0.08, axis


@pytest.mark.parametrize('rate', [0.1, 0.5])
def test_rows_heads_keys_and_seeds_are_independent(rate):
    normal = lambda seed: (bits(seed, rate) - (1 - rate)) / np.sqrt(rate * (1 - rate))  # noqa: E731
    x = normal(7)
    for axis in range(4):
        for lag in (1, 2, 3):
            a, b = np.moveaxis(x, axis, 0)[lag:], np.moveaxis(x, axis, 0)[:-lag]
            assert abs((a * b).mean() * np.sqrt(a.size)) < 4.5, (axis, lag)
    for seed in (6, 8, -7, 7 + 2**16):
        assert abs((x * normal(seed)).mean() * np.sqrt(x.size)) < 4.5, seed
    # A neighbouring seed must not be the same bits in another place.
    y = normal(6)
    for b, h in np.ndindex(4, 4):
        assert abs((x[0, 0] * y[b, h]).mean() * np.sqrt(x[0, 0].size)) < 4.5
    for rows in (x.reshape(-1, 256)[:1024], np.moveaxis(x, 3, 0).reshape(256, -1)[:, :1024]):
        products = rows @ rows.T / np.sqrt(rows.shape[1])
        products = products[np.triu_indices(len(rows), 1)]
        assert abs(products.std() - 1) < 0.02
        assert abs(products).max() < 8


def test_a_rate_becomes_the_threshold_of_as_many_hashes():
    for rate, want in (0.0, -(2**31)), (0.5, 0), (0.25, -(2**30)), (1 - 2**-40, 2**31 - 1):
        assert dropout.threshold(rate) == want


@pytest.mark.parametrize('impl', ['reference', 'xla'])
def test_the_gradient_drops_what_the_value_drops(impl):
    case = Case(dropout_rate=0.5, lengths=(8, 8), sizes=(8, 8))
    arrays, others = arguments(case)
    # With values that are one-hot, the outputs are the weights.
    arrays['v'] = jnp.broadcast_to(jnp.eye(8)[None, :, None], (2, 8, 2, 8))

    @jax.jit
    def run(v):
        o, vjp = jax.vjp(lambda v: attend(impl, arrays | {'v': v}, others)[0], v)
        return o, vjp(jnp.ones_like(o))[0]

    o, dv = run(arrays['v'])
    keep_BHTS = kept(SEED, 0.5, (2, 2, 8, 8))
    np.testing.assert_array_equal(np.asarray(o).swapaxes(1, 2) != 0, keep_BHTS)
    np.testing.assert_allclose(dv[..., 0], np.asarray(o).sum(1).swapaxes(1, 2), rtol=1e-5)
    undropped = attend(impl, arrays, {'causal': False})[0]
    np.testing.assert_allclose(o, 2 * undropped * keep_BHTS.swapaxes(1, 2), rtol=1e-5)
