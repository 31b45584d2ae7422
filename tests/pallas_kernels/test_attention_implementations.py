"""Every implementation of attention by one class: values, gradients, lse, bits, who sees whom."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    IMPLS,
    LEVELS,
    MORE,
    Case,
    arguments,
    assert_close,
    attend,
    cotangents,
    covering,
    skip_refused,
    with_gradients,
)
from attention_oracle import oracle, plain, seen
from hypothesis import given, settings
from hypothesis import strategies as st

COVERING = covering()
DRAWN = st.builds(
    Case, **{name: st.sampled_from(levels + MORE.get(name, ())) for name, levels in LEVELS.items()}
)


@functools.lru_cache
def expected(case, seed):
    """Returns the results of plain XLA and of the oracle, for all implementations."""
    arrays, others = arguments(case, seed)
    base = with_gradients(
        'plain', lambda arrays: plain(case, arrays, others), arrays, cotangents(case)
    )
    return base(), oracle(case, arrays, others, *cotangents(case))


def compare(impl, case, seed=0):
    arrays, others = arguments(case, seed)
    skip_refused(impl, arrays, others)
    run = with_gradients(
        impl, lambda arrays: attend(impl, arrays, others), arrays, cotangents(case)
    )
    got = run()
    for name in arrays:
        assert (got[name].dtype, got[name].shape) == (arrays[name].dtype, arrays[name].shape)
    assert (got['o'].dtype, got['lse'].dtype) == (case.dtype, 'float32')
    assert_close(case, got, *expected(case, seed))
    for name, x in run().items():
        np.testing.assert_array_equal(x, got[name], err_msg=f'{name} of a second run')


def test_every_pair_of_features_occurs():
    pairs = set().union(*(case.pairs() for case in COVERING))
    for a, b in ((a, b) for a in LEVELS for b in LEVELS if a < b):
        found = {frozenset(pair) for pair in pairs}
        for x in LEVELS[a]:
            for y in LEVELS[b]:
                assert frozenset({(a, x), (b, y)}) in found


@pytest.mark.parametrize('impl', IMPLS)
class TestAttention:
    """What is true of every implementation."""

    @pytest.mark.parametrize('number', range(len(COVERING)))
    def test_every_pair_of_features_is_right_and_repeats_bit_for_bit(self, impl, number):
        compare(impl, COVERING[number], seed=number)

    @settings(max_examples=3, deadline=None, derandomize=True, database=None)
    @given(case=DRAWN, seed=st.integers(100, 200))
    def test_any_features_together_are_right(self, impl, case, seed):
        compare(impl, case, seed)

    @pytest.mark.parametrize('sinks', [False, True])
    def test_rows_that_see_nothing_are_zero_and_have_no_gradient(self, impl, sinks):
        case = Case(mask='full', sinks=sinks, bias='full', dropout_rate=0.3)
        arrays, others = arguments(case)
        skip_refused(impl, arrays, others)
        others['mask'] = others['mask'].copy()
        others['mask'][0], others['mask'][1, :, 2] = False, False
        # No mask tells that these see nothing, and -inf minus their lse is no number.
        arrays['bias'] = arrays['bias'].at[1, :, 5].set(-np.inf)
        if sinks:  # a head without one
            arrays['sinks'] = arrays['sinks'].at[1].set(-np.inf)
        run = with_gradients(impl, lambda x: attend(impl, x, others), arrays, cotangents(case))
        got = {name: np.asarray(x) for name, x in run().items()}
        lse = np.broadcast_to(arrays['sinks'][:, None] if sinks else -np.inf, (2, 24))
        assert not got['o'][0].any()
        np.testing.assert_allclose(got['lse'][0], lse, rtol=1e-6)
        for t in (2, 5):
            assert not got['o'][1, t].any()
            np.testing.assert_allclose(got['lse'][1, :, t], lse[:, 0], rtol=1e-6)
            assert not got['q'][1, t].any()
            assert not got['bias'][1, :, t].any()
        for name in ('q', 'k', 'v', 'bias'):
            assert not got[name][0].any(), name
            assert np.isfinite(got[name][1]).all(), name
            assert got[name][1].any(), name
        if sinks:
            assert np.isfinite(got['sinks']).all()

    @pytest.mark.parametrize(
        'features',
        [
            {'causal': True},
            {'causal': True, 'window': (5, None), 'lengths': (17, 40)},
            {'window': (2, 4), 'segments': True, 'lengths': (40, 24)},
            {'mask': 'full'},
        ],
        ids=lambda features: '-'.join(features),
    )
    def test_gradients_reach_what_a_query_sees_and_nothing_else(self, impl, features):
        case = Case(heads=(2, 1), **features)
        arrays, others = arguments(case)
        skip_refused(impl, arrays, others)
        (H, _), (T, S) = case.heads, case.lengths

        @jax.jit
        def gradients(t):
            pick = lambda x: attend(impl, x, others)[0][:, t].sum()  # noqa: E731
            return jax.grad(pick)(arrays)

        seen_BHTS = seen(others, H, T, S)
        for t in (0, 3, T - 1):
            reached = {n: np.asarray(x).any((2, 3)) for n, x in gradients(jnp.int32(t)).items()}
            np.testing.assert_array_equal(reached['v'], seen_BHTS[:, :, t].any(1))
            # One key alone has weight 1, whatever its logit.
            several = seen_BHTS[:, :, t].sum(-1, keepdims=True) > 1
            np.testing.assert_array_equal(reached['k'], (seen_BHTS[:, :, t] & several).any(1))
            assert not np.delete(reached['q'], t, axis=1).any()
            np.testing.assert_array_equal(reached['q'][:, t], several.any((1, 2)))

    def test_the_gradient_of_lse_alone_is_that_of_a_logsumexp(self, impl):
        case = Case(causal=True, sinks=True)
        arrays, others = arguments(case)
        skip_refused(impl, arrays, others)

        def weights(impl):
            return jax.jit(jax.grad(lambda x: attend(impl, x, others)[1].sum()))(arrays)

        got, want = weights(impl), weights('reference')
        assert not got['v'].any()
        for name in arrays:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=2e-6, err_msg=name)

    def test_float64_is_exact_and_without_lse_only_o_is_returned(self, impl):
        if impl not in ('reference', 'xla'):
            pytest.skip('no accelerator multiplies float64')
        with jax.enable_x64(True):
            case = Case(causal=True, softcap=2.0, heads=(4, 2), bias='keys', sinks=True)
            arrays, others = arguments(case)
            arrays = {name: x.astype(jnp.float64) for name, x in arrays.items()}
            given = [x.astype(jnp.float64) for x in cotangents(case)]

            @jax.jit
            def run(arrays):
                o, vjp = jax.vjp(lambda x: attend(impl, x, others, return_lse=False), arrays)
                return {'o': o, **vjp(given[0])[0]}

            got = run(arrays)
            want = oracle(case, arrays, others, given[0], 0 * given[1])
            for name, x in got.items():
                assert x.dtype == jnp.float64
                np.testing.assert_allclose(x, want[name], rtol=1e-10, atol=1e-12, err_msg=name)
