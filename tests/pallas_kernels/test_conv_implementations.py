"""Every implementation of convolution by one class: values, gradients, bits, packing, state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled, jitted
from conv_cases import (
    IMPLS,
    LEVELS,
    MORE,
    B,
    Case,
    Sequence,
    arguments,
    assert_close,
    convolve,
    cotangent,
    covering,
    output_shape,
    pairs,
    possible,
    skip_refused,
    with_gradients,
)
from conv_oracle import oracle, plain
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.conv import conv1d

COVERING = {kind: covering(kind) for kind in LEVELS}


def drawn(kind):
    levels = {name: levels + MORE[kind].get(name, ()) for name, levels in LEVELS[kind].items()}
    cases = st.builds(kind, **{name: st.sampled_from(many) for name, many in levels.items()})
    return cases.filter(lambda case: case.fits and min(output_shape(case)) > 0)


@functools.lru_cache
def expected(case, seed):
    """Returns the results of plain XLA and of the oracle, for all implementations."""
    arrays, others = arguments(case, seed)
    dy = cotangent(case)
    base = with_gradients('plain', lambda arrays: plain(case, arrays, others), arrays, dy)
    return base(), oracle(case, arrays, others, dy)


def compare(impl, case, seed=0):
    arrays, others = arguments(case, seed)
    skip_refused(impl, arrays, others)
    run = with_gradients(
        impl, lambda arrays: convolve(impl, arrays, others), arrays, cotangent(case)
    )
    got = run()
    for name in arrays:
        assert (got[name].dtype, got[name].shape) == (arrays[name].dtype, arrays[name].shape)
    assert (got['y'].dtype, got['y'].shape) == (case.dtype, output_shape(case))
    assert_close(case, got, *expected(case, seed))
    for name, x in run().items():
        np.testing.assert_array_equal(x, got[name], err_msg=f'{name} of a second run')


@pytest.mark.parametrize('kind', LEVELS)
def test_every_pair_of_features_that_go_together_occurs(kind):
    assert possible(kind) <= set().union(*map(pairs, COVERING[kind]))


@pytest.mark.parametrize('impl', IMPLS)
class TestConvolution:
    """What is true of every implementation."""

    @pytest.mark.parametrize('number', range(len(COVERING[Case])))
    def test_every_pair_of_an_images_features_is_right_and_repeats(self, impl, number):
        compare(impl, COVERING[Case][number], seed=number)

    @pytest.mark.parametrize('number', range(len(COVERING[Sequence])))
    def test_every_pair_of_a_sequences_features_is_right_and_repeats(self, impl, number):
        compare(impl, COVERING[Sequence][number], seed=number)

    @settings(max_examples=3, deadline=None, derandomize=True, database=None)
    @given(case=drawn(Case), seed=st.integers(100, 200))
    def test_any_features_of_images_together_are_right(self, impl, case, seed):
        compare(impl, case, seed)

    @settings(max_examples=3, deadline=None, derandomize=True, database=None)
    @given(case=drawn(Sequence), seed=st.integers(100, 200))
    def test_any_features_of_sequences_together_are_right(self, impl, case, seed):
        compare(impl, case, seed)

    @pytest.mark.parametrize('padding', ['CAUSAL', 'SAME'])
    @pytest.mark.parametrize('channels', [(8, 8, 8), (8, 16, 1)], ids=['depthwise', 'dense'])
    def test_packed_sequences_are_what_each_is_alone(self, impl, channels, padding):
        case = Sequence(channels=channels, padding=padding, dilation=2, bias=True)
        arrays, others = arguments(case._replace(segments=True))
        others['segment_ids'] = np.repeat([[0, 1, 1], [3, 3, 2]], 8, axis=1).astype(np.int32)
        skip_refused(impl, arrays, others)
        dy = cotangent(case)

        def apart(arrays, others):
            """Returns what each segment makes alone; those of one length are a batch."""
            x_BTC = arrays['x']
            short = jnp.stack([x_BTC[0, :8], x_BTC[1, 16:]])
            long = jnp.stack([x_BTC[0, 8:], x_BTC[1, :16]])
            short, long = (convolve(impl, {**arrays, 'x': x}, others) for x in (short, long))
            first, second = (short[0], long[0]), (long[1], short[1])
            return jnp.stack([jnp.concatenate(row) for row in (first, second)])

        got = with_gradients(impl, lambda arrays: convolve(impl, arrays, others), arrays, dy)()
        others.pop('segment_ids')
        want = with_gradients(impl, lambda arrays: apart(arrays, others), arrays, dy)()
        for name, x in want.items():
            np.testing.assert_allclose(got[name], x, rtol=1e-5, atol=1e-5, err_msg=name)

    # Not of an exponential, which XLA computes otherwise at another place of an array on a CPU.
    @pytest.mark.parametrize('activation', [None, 'relu'])
    def test_a_sequence_in_steps_has_the_bits_of_the_whole(self, impl, activation):
        case = Sequence(dilation=2, bias=True, activation=activation)
        arrays, others = arguments(case)
        skip_refused(impl, arrays, others)
        run = jitted(
            impl,
            lambda x, state: convolve(
                impl, {**arrays, 'x': x}, others, state=state, return_state=True
            ),
        )
        whole, last = run(arrays['x'], None)
        parts, state, start = [], jnp.zeros_like(last), 0
        for length in (11, 1, 1, 11):
            y, state = run(arrays['x'][:, start : start + length], state)
            parts.append(y)
            start += length
        np.testing.assert_array_equal(jnp.concatenate(parts, 1), whole)
        np.testing.assert_array_equal(state, last)

    def test_an_output_reads_its_own_past_and_nothing_else(self, impl):
        case = Sequence(kernel=3, dilation=5, channels=(8, 16, 1))
        arrays, others = arguments(case)
        skip_refused(impl, arrays, others)
        pick = jitted(
            impl, jax.grad(lambda x, t: convolve(impl, {**arrays, 'x': x}, others)[:, t].sum())
        )
        for t in (0, 7, 23):
            reached = np.asarray(pick(arrays['x'], t)).any((0, 2))
            assert set(np.flatnonzero(reached)) == {n for n in (t, t - 5, t - 10) if n >= 0}

    def test_float64_is_exact(self, impl):
        if impl not in ('reference', 'xla'):
            pytest.skip('no accelerator multiplies float64')
        with jax.enable_x64(True):
            for case in (
                Case(scale=True, residual=True, bias=True, activation='gelu', stride=(2, 1)),
                Case(channels=(6, 12, 6), dilation=(2, 1), activation='relu'),
                Sequence(state=True, segments=True),
            ):
                arrays, others = arguments(case)
                arrays = {name: x.astype(jnp.float64) for name, x in arrays.items()}
                dy = cotangent(case).astype(jnp.float64)
                function = lambda arrays, others=others: convolve(impl, arrays, others)  # noqa: E731
                got = with_gradients(impl, function, arrays, dy)()
                for name, x in oracle(case, arrays, others, dy).items():
                    assert got[name].dtype == jnp.float64
                    np.testing.assert_allclose(got[name], x, rtol=1e-10, atol=1e-11, err_msg=name)


CASES = {
    'dense': Case(bias=True, scale=True, residual=True, activation='silu', stride=(2, 1)),
    'depthwise': Case(channels=(8, 8, 8), bias=True, activation='relu', dilation=(2, 1)),
    'causal': Sequence(bias=True, activation='tanh', segments=True, state=True),
}


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('mode', ['reverse', 'forward'])
def test_a_second_derivative_is_that_of_plain_operations(impl, name, mode):
    case = CASES[name]
    arrays, others = arguments(case)
    skip_refused(impl, arrays, others)
    got = second(lambda arrays: convolve(impl, arrays, others), arrays, mode)
    for n, x in plain_second(name, mode).items():
        atol = 1e-4 * float(jnp.abs(x).max())
        np.testing.assert_allclose(got[n], x, rtol=0, atol=atol, err_msg=n)


def second(function, arrays, mode):
    """Returns the derivatives of a loss's slope along one direction, by array."""
    directions = {n: jnp.cos(jnp.arange(x.size)).reshape(x.shape) for n, x in arrays.items()}
    loss = lambda arrays: (function(arrays) ** 3).sum()  # noqa: E731

    def slope(arrays):
        return sum((g * directions[n]).sum() for n, g in jax.grad(loss)(arrays).items())

    if mode == 'reverse':
        return compiled('', jax.grad(slope), arrays)()
    return compiled('', lambda x: jax.jvp(jax.grad(loss), (x,), (directions,))[1], arrays)()


@functools.cache
def plain_second(name, mode):
    arrays, others = arguments(CASES[name])
    return second(lambda arrays: plain(CASES[name], arrays, others), arrays, mode)


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('name', CASES)
def test_vmap_is_the_call_of_each_value_and_gradient(impl, name):
    case = CASES[name]
    both = [arguments(case, seed)[0] for seed in (0, 1)]
    others = arguments(case)[1]
    skip_refused(impl, both[0], others)
    # Of the mapped operands, some are, and some are not: the kernel and the scale.
    shared = {n: both[0][n] for n in ('w', 'scale', 'shift') if n in both[0]}
    arrays = {n: jnp.stack([x[n] for x in both]) for n in both[0] if n not in shared}

    def run(arrays, shared):
        loss = lambda *given: (convolve(impl, {**given[0], **given[1]}, others) ** 2).sum()  # noqa: E731
        value, (one, two) = jax.value_and_grad(loss, (0, 1))(arrays, shared)
        return {'value': value, **one, **two}

    got = compiled(impl, jax.vmap(run, in_axes=(0, None)), arrays, shared)()
    single = jitted(impl, run)
    for i in range(2):
        want = single({n: x[i] for n, x in arrays.items()}, shared)
        for n, x in want.items():
            atol = 1e-5 * float(jnp.abs(x).max())
            np.testing.assert_allclose(got[n][i], x, rtol=0, atol=atol, err_msg=n)


def test_integers_have_gradients_of_no_type():
    ids = jnp.zeros((B, 8), jnp.int32)
    x, w = jnp.ones((B, 8, 4)), jnp.ones((3, 1, 4))
    loss = lambda ids: conv1d(x, w, groups=4, padding='CAUSAL', segment_ids=ids).sum()  # noqa: E731
    assert jax.grad(loss, allow_int=True)(ids).dtype == jax.dtypes.float0
