"""Attention: every implementation against the specification, causality, the cached form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax.nn.attention import attention, cached_attention


def inputs(T, S=None, *, H=2, K=None, D=4, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    S, K = S or T, K or H
    shapes = (2, T, H, D), (2, S, K, D), (2, S, K, D), (2, T, H, D)
    *qkv, g = (
        jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)
    )
    return qkv, g


@pytest.mark.parametrize(
    ('impl', 'T', 'S', 'K', 'causal'),
    [
        ('xla', 5, 5, 2, True),
        ('xla', 3, 5, 1, True),
        ('xla', 5, 3, 2, False),
        ('blocked', 128, 128, 2, True),
        ('blocked', 192, 192, 1, True),
    ],
)
def test_value_and_gradient_equal_the_reference_in_float64(impl, T, S, K, causal):
    with jax.enable_x64(True):
        qkv, g = inputs(T, S, K=K, dtype=jnp.float64)

        def run(impl):
            y, vjp = jax.vjp(lambda *qkv: attention(*qkv, causal=causal, impl=impl), *qkv)
            return y, *vjp(g)

        for got, want in zip(jax.jit(run, static_argnums=0)(impl), run('reference'), strict=True):
            assert got.dtype == jnp.float64
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(('impl', 'T'), [('reference', 6), ('xla', 6), ('blocked', 128)])
def test_an_output_has_no_gradient_to_later_positions(impl, T):
    qkv, _ = inputs(T, H=1)
    t = T // 2 - 1
    grads = jax.grad(lambda qkv: attention(*qkv, causal=True, impl=impl)[:, t].sum())(qkv)
    for grad in grads[1:]:
        assert np.all(grad[:, t + 1 :] == 0)
        assert np.all(np.any(grad[:, : t + 1] != 0, axis=(2, 3)))
    assert np.all(np.delete(grads[0], t, axis=1) == 0)


@pytest.mark.parametrize(('impl', 'T'), [('xla', 8), ('blocked', 128)])
def test_bfloat16_stays_near_the_reference(impl, T):
    qkv, g = inputs(T, dtype=jnp.bfloat16)
    y, vjp = jax.vjp(lambda *qkv: attention(*qkv, causal=True, impl=impl), *qkv)
    exact = attention(*(x.astype(jnp.float32) for x in qkv), causal=True, impl='reference')
    assert {x.dtype for x in (y, *vjp(g))} == {jnp.dtype('bfloat16')}
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.03)


def visible(shape):
    """A mask [B, H, T, S] (or with ones) that hides about half, and all from query 1 of row 0."""
    mask = jax.random.bernoulli(jax.random.key(1), 0.5, shape)
    return mask.at[0, :, min(1, shape[2] - 1)].set(False)


@pytest.mark.parametrize(
    ('shape', 'causal'),
    [((2, 1, 1, 5), False), ((2, 2, 4, 5), False), ((1, 1, 4, 5), True), ((2, 1, 4, 5), True)],
)
def test_a_mask_hides_keys_as_in_the_reference_in_float64(shape, causal):
    with jax.enable_x64(True):
        qkv, g = inputs(4, 5, dtype=jnp.float64)
        mask = visible(shape)

        def run(impl):
            attend = lambda *qkv: attention(*qkv, causal=causal, mask=mask, impl=impl)  # noqa: E731
            y, vjp = jax.vjp(attend, *qkv)
            return y, *vjp(g)

        for got, want in zip(jax.jit(run, static_argnums=0)('xla'), run('reference'), strict=True):
            assert np.isfinite(want).all()
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('impl', ['reference', 'xla'])
def test_a_masked_key_has_no_part_in_any_output_and_a_blind_query_gives_zero(impl, causal):
    qkv, g = inputs(4, 5)
    given = visible((2, 2, 4, 5))
    mask = given & jnp.tri(4, 5, 1, bool)[None, None] if causal else given

    def output(qkv, row, head, t):
        return attention(*qkv, causal=causal, mask=given, impl=impl)[row, t, head] @ g[row, t, head]

    for row, head, t in [(0, 0, 0), (0, 1, 1), (1, 1, 3)]:
        dq, dk, dv = jax.grad(output)(qkv, row, head, t)
        seen = mask[row, head, t]
        assert np.array_equal(np.any(dv[row, :, head] != 0, axis=-1), seen)
        assert not np.any(dk[row, :, head][~seen])
        assert np.isfinite(dq).all()
    y = attention(*qkv, causal=causal, mask=given, impl=impl)
    assert not np.any(y[0, 1])
    assert np.all(np.any(y[1] != 0, axis=-1) == np.any(mask[1], axis=-1).T)


@pytest.mark.parametrize('impl', ['reference', 'xla'])
def test_the_first_causal_queries_of_too_many_are_blind(impl):
    qkv, _ = inputs(5, 3)
    y = attention(*qkv, causal=True, impl=impl)
    assert not np.any(y[:, :2])
    np.testing.assert_allclose(y[:, 2:], attention(qkv[0][:, 2:], *qkv[1:], causal=True), atol=1e-6)


def test_a_choice_is_made_for_every_shape():
    for T in (5, 256):
        qkv, _ = inputs(T)
        np.testing.assert_allclose(
            attention(*qkv, causal=True),
            attention(*qkv, causal=True, impl='reference'),
            atol=1e-5,
        )
    real_BS = jnp.arange(256)[None] < jnp.array([256, 100])[:, None]
    hidden = attention(*qkv, causal=True, mask=real_BS[:, None, None])
    short = (x[1:, :100] for x in qkv)
    np.testing.assert_allclose(hidden[1:, :100], attention(*short, causal=True), atol=1e-5)


def test_cached_attention_equals_causal_attention_and_ignores_what_lies_behind():
    (q_BTHD, k_BSHD, v_BSHD), _ = inputs(7)
    full = attention(q_BTHD, k_BSHD, v_BSHD, causal=True, impl='reference')
    start_B = jnp.array([2, 4])
    queries = jnp.stack([q_BTHD[0, 2:5], q_BTHD[1, 4:7]])
    # The largest number rather than NaN: zero weight times NaN would not be zero.
    k_BSHD, v_BSHD = (x.at[0, 5:].set(1e30) for x in (k_BSHD, v_BSHD))
    got = cached_attention(queries, k_BSHD, v_BSHD, start_B=start_B)
    np.testing.assert_allclose(got, jnp.stack([full[0, 2:5], full[1, 4:7]]), atol=1e-6)


@pytest.mark.parametrize(('impl', 'T'), [('xla', 8), ('blocked', 128)])
def test_batch_and_heads_spread_over_devices_exchange_nothing(impl, T):
    mesh = jax.make_mesh((2, 2), ('data', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spread = jax.NamedSharding(mesh, jax.P('data', None, 'tensor'))
    qkv, g = inputs(T)

    def run(q_BTHD, k_BTHD, v_BTHD, g_BTHD):
        attend = lambda *qkv: attention(*qkv, causal=True, impl=impl)  # noqa: E731
        y_BTHD, vjp = jax.vjp(attend, q_BTHD, k_BTHD, v_BTHD)
        return y_BTHD, *vjp(g_BTHD)

    jitted = jax.jit(run, in_shardings=(spread,) * 4, out_shardings=spread)
    compiled = jitted.lower(*qkv, g).compile().as_text()
    assert 'num_partitions=4' in compiled
    for collective in ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute'):
        assert collective not in compiled


@pytest.mark.parametrize(
    ('shapes', 'options', 'message'),
    [
        (((1, 96, 2, 4),) * 3, {'impl': 'blocked'}, 'T=96 must be a multiple of 64'),
        (((1, 64, 2, 4),) * 3, {'impl': 'blocked', 'causal': False}, 'needs causal=True'),
        (((1, 4, 2, 4),) * 3, {'impl': 'flash'}, "impl='flash': must be 'reference'"),
        (((1, 4, 3, 4), (1, 4, 2, 4), (1, 4, 2, 4)), {}, 'K dividing H'),
        (
            ((1, 64, 2, 4),) * 3,
            {'impl': 'blocked', 'mask': np.ones((1, 1, 1, 64), bool)},
            'no mask',
        ),
        (
            ((2, 4, 2, 4),) * 3,
            {'mask': np.ones((2, 4), bool)},
            r'mask of bool .* not bool \(2, 4\)',
        ),
        (((2, 4, 2, 4),) * 3, {'mask': np.ones((2, 1, 1, 4))}, 'not float64'),
        (((4, 2, 4),) * 3, {}, r'takes \[B, T, H, D\]'),
    ],
)
def test_what_cannot_run_is_refused(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        attention(*map(jnp.zeros, shapes), **({'causal': True} | options))
