"""The way to the attention kernels: on a mesh, with a cache, and refused by the flag's name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import sharding
from bigjax.experiment import UsageError
from bigjax.nn.attention import attention, cached_attention


def inputs(T, S=None, *, B=2, H=2, K=None, D=8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    S, K = S or T, K or H
    shapes = (B, T, H, D), (B, S, K, D), (B, S, K, D), (B, T, H, D)
    *qkv, g = (
        jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)
    )
    return qkv, g


def gradients(impl, qkv, g, **features):
    y, vjp = jax.vjp(lambda *qkv: attention(*qkv, impl=impl, **features), *qkv)
    return y, *vjp(g)


@pytest.mark.parametrize('impl', ['auto', 'xla', 'tpu'])
@pytest.mark.parametrize('mesh', [None, 'data=2,fsdp=2,tensor=2'])
def test_value_and_gradient_are_the_references_on_every_mesh(impl, mesh):
    qkv, g = inputs(16, B=4, H=4, K=2)
    mask = (jnp.arange(16)[None] < jnp.array([16, 9, 16, 1])[:, None])[:, None, None]
    want = gradients('reference', qkv, g, causal=True, mask=mask)
    run = jax.jit(lambda *qkv: gradients(impl, qkv, g, causal=True, mask=mask))
    if mesh is None:
        got = run(*qkv)
    else:
        with jax.set_mesh(sharding.make_mesh(mesh)):
            got = run(*qkv)
    for name, have, need in zip(['y', 'dq', 'dk', 'dv'], got, want, strict=True):
        np.testing.assert_allclose(have, need, atol=2e-6, err_msg=name)


@pytest.mark.parametrize('impl', ['xla', 'tpu'])
def test_batch_and_heads_spread_over_devices_exchange_nothing(impl):
    mesh = sharding.make_mesh('data=4,tensor=2')
    spread = jax.NamedSharding(mesh, jax.P('data', None, 'tensor'))
    qkv, g = inputs(8, B=4)

    def run(q_BTHD, k_BTHD, v_BTHD, g_BTHD):
        return gradients(impl, (q_BTHD, k_BTHD, v_BTHD), g_BTHD, causal=True)

    jitted = jax.jit(run, in_shardings=(spread,) * 4, out_shardings=spread)
    with jax.set_mesh(mesh):
        compiled = jitted.lower(*qkv, g).compile().as_text()
    assert 'num_partitions=8' in compiled
    for collective in ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute'):
        assert collective not in compiled


@pytest.mark.parametrize(
    ('impl', 'mesh'),
    [('auto', None), ('tpu', None), ('auto', 'data=4,tensor=2'), ('tpu', 'data=2,fsdp=2,tensor=2')],
)
def test_cached_attention_equals_causal_attention_and_ignores_what_lies_behind(impl, mesh):
    (q_BTHD, k_BSHD, v_BSHD), _ = inputs(7)
    full = attention(q_BTHD, k_BSHD, v_BSHD, causal=True, impl='reference')
    start_B = jnp.array([2, 4])
    queries = jnp.stack([q_BTHD[0, 2:5], q_BTHD[1, 4:7]])
    k_BSHD, v_BSHD = (x.at[0, 5:].set(jnp.nan) for x in (k_BSHD, v_BSHD))
    k_BSF, v_BSF = (x.reshape(*x.shape[:2], -1) for x in (k_BSHD, v_BSHD))
    run = jax.jit(functools.partial(cached_attention, impl=impl))
    if mesh is None:
        got = run(queries, k_BSF, v_BSF, start_B=start_B)
    else:  # of two rows, an axis of the batch has nothing to split
        with jax.set_mesh(sharding.make_mesh(mesh)):
            got = run(queries, k_BSF, v_BSF, start_B=start_B)
            text = run.lower(queries, k_BSF, v_BSF, start_B=start_B).as_text()
        assert ('manual_computation' in text) == (impl == 'tpu')
    np.testing.assert_allclose(got, jnp.stack([full[0, 2:5], full[1, 4:7]]), atol=1e-6)


def test_what_the_named_implementation_cannot_run_is_told_in_terms_of_the_flag():
    qkv, _ = inputs(8)
    with pytest.raises(UsageError) as error:
        attention(*qkv, causal=True, impl='gpu')
    assert str(error.value).startswith('--attention=gpu: ')
    assert str(error.value).endswith('; try --attention=xla')
    assert "impl='" not in str(error.value)


def test_what_does_not_fit_is_no_matter_of_the_flag():
    (q, k, v), _ = inputs(8, H=3, K=2)
    with pytest.raises(ValueError, match='3') as error:
        attention(q, k, v, impl='xla')
    assert not isinstance(error.value, UsageError)
