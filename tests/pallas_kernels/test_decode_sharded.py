"""Decode attention over batch and head axes of a mesh is that of one device.

Legend: B rows, T new tokens, S tokens of a row's cache, H query heads, K key-value heads, D and V
sizes of heads, P tokens of a page.
"""

import ahead_of_time
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import decode_attention, shard_decode
from pallas_kernels.block_sizes import BlockSizes

SPLIT = shard_decode(batch=('data', 'fsdp'), heads='tensor')
OPTIONS = {'window': 20, 'softcap': 3.0, 'return_lse': True}


def make_mesh(kind=AxisType.Auto, **sizes):
    sizes = {'data': 1, 'fsdp': 1, 'tensor': 1} | sizes
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * 3)


def operands(B=4, T=2, H=4, K=2, D=16, V=8, S=32):
    rng = np.random.default_rng(0)
    q_BTHD, k_BSKD, v_BSKV = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((B, T, H, D), (B, S, K, D), (B, S, K, V))
    )
    lengths_B = jnp.asarray([0, S, 17, 1, 25, 9, 30, 32][:B], jnp.int32)
    return q_BTHD, k_BSKD, v_BSKV, lengths_B, jnp.asarray(rng.normal(size=H), jnp.float32)


def paged(k_BSKD, v_BSKV, page=8):
    """The same cache as pages that lie in the opposite order, and their table."""
    B, S = k_BSKD.shape[:2]
    pages = (x.reshape(-1, page, *x.shape[2:])[::-1] for x in (k_BSKD, v_BSKV))
    return *pages, jnp.arange(B * S // page, dtype=jnp.int32)[::-1].reshape(B, -1)


def run(call, q, k, v, lengths_B, sinks, table=None, **options):
    def called(q, k, v, lengths_B, sinks, table):
        given = {'lengths_B': lengths_B, 'sinks': sinks, 'page_table_BP': table}
        return call(q, k, v, **given, **OPTIONS | options)

    return jax.jit(called)(q, k, v, lengths_B, sinks, table)


def assert_equal(got, want):
    for a, b in zip(jax.device_get(got), jax.device_get(want), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)


@pytest.mark.parametrize(
    ('impl', 'sizes', 'shape'),
    [
        ('xla', {'data': 2, 'fsdp': 2, 'tensor': 2}, {}),
        ('tpu', {'data': 2, 'fsdp': 2, 'tensor': 2}, {}),
        ('tpu', {'tensor': 2}, {'K': 1}),  # one key-value head for both devices
        ('xla', {'tensor': 4}, {'H': 12, 'K': 6}),  # devices of three heads, groups of two
        ('xla', {'data': 2, 'fsdp': 2}, {'B': 6}),  # the second axis does not divide the rows
        ('xla', {'data': 4, 'tensor': 2}, {'B': 1}),  # a row for all
    ],
)
def test_values_are_those_of_one_device(impl, sizes, shape):
    x = operands(**shape)
    want = run(decode_attention, *x, impl='reference')
    with jax.set_mesh(make_mesh(**sizes)):
        assert_equal(run(SPLIT, *x, impl=impl), want)


def test_every_device_reads_its_heads_of_the_pages():
    q, k, v, lengths_B, sinks = operands()
    k_NPKD, v_NPKV, table = paged(k, v)
    want = run(decode_attention, q, k, v, lengths_B, sinks, impl='reference')
    with jax.set_mesh(make_mesh(data=2, tensor=2)):
        got = run(SPLIT, q, k_NPKD, v_NPKV, lengths_B, sinks, table, impl='tpu')
    assert_equal(got, want)


def test_nothing_is_communicated():
    mesh = make_mesh(data=4, tensor=2)
    q, k, v, lengths_B, _ = operands()
    split = NamedSharding(mesh, P('data', None, 'tensor'))
    # As a cache is kept: heads side by side.
    k, v = (x.reshape(*x.shape[:2], -1) for x in (k, v))
    q, k, v = jax.device_put((q, k, v), split)

    def call(q, k, v, lengths_B):
        heads = (x.reshape(*x.shape[:2], 2, -1) for x in (k, v))
        return SPLIT(q, *heads, lengths_B=lengths_B, impl='tpu')

    lengths_B = jax.device_put(lengths_B, NamedSharding(mesh, P('data')))
    with jax.set_mesh(mesh):
        compiled = jax.jit(call).lower(q, k, v, lengths_B).compile()
    assert compiled.output_shardings.is_equivalent_to(split, 4)
    for collective in 'all-reduce', 'all-gather', 'all-to-all', 'collective-permute':
        assert collective not in compiled.as_text()


def test_explicit_axes_and_vmap():
    stacked = [jnp.stack([n, n[::-1]]) for n in operands()]

    def mapped(call):
        def one(q, k, v, lengths_B, sinks):
            return call(q, k, v, lengths_B=lengths_B, sinks=sinks, **OPTIONS, impl='xla')

        return jax.jit(jax.vmap(one))

    want = mapped(decode_attention)(*stacked)
    for kind in AxisType.Auto, AxisType.Explicit:
        with jax.set_mesh(make_mesh(kind, data=2, tensor=2)):
            assert_equal(mapped(SPLIT)(*stacked), want)


@pytest.mark.parametrize(
    ('call', 'around'),
    [
        (SPLIT, {'data'}),
        (SPLIT, {'data', 'fsdp', 'tensor'}),
        (decode_attention, {'data', 'fsdp', 'tensor'}),
    ],
    ids=['some', 'all', 'unsplit'],
)
def test_within_shard_map_with_checked_types(call, around):
    x = operands()
    want = run(decode_attention, *x, impl='xla')
    heads = 'tensor' if 'tensor' in around else None
    row = P('data', None, heads)

    def mapped(q, k, v, *, lengths_B, sinks, page_table_BP, **options):
        return jax.shard_map(
            lambda q, k, v, n, sinks: call(q, k, v, lengths_B=n, sinks=sinks, **options),
            in_specs=(row, row, row, P('data'), P(heads)),
            out_specs=(row, P('data', heads)),
            axis_names=around,
        )(q, k, v, lengths_B, sinks)

    with jax.set_mesh(make_mesh(data=2, tensor=2)):
        for sizes in None, BlockSizes(128, 8, 8, 128):  # one block, and a loop over several
            assert_equal(run(mapped, *x, impl='xla', block_sizes=sizes), want)


def test_derivatives_are_those_of_one_device():
    q, k, v, lengths_B, sinks = operands(K=1)

    def gradients(call):
        def loss(q, k, v, sinks):
            o_BTHV, lse_BHT = call(q, k, v, lengths_B=lengths_B, sinks=sinks, **OPTIONS, impl='xla')
            return jnp.sin(o_BTHV).sum() + jnp.cos(lse_BHT).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(q, k, v, sinks)

    want = gradients(decode_attention)
    with jax.set_mesh(make_mesh(data=2, tensor=2)):
        assert_equal(gradients(SPLIT), want)


def test_without_a_mesh_it_is_decode_attention():
    x = operands()[:3]
    given = {'lengths_B': jnp.zeros(4, jnp.int32), 'impl': 'xla'}
    traced = lambda call: str(jax.make_jaxpr(lambda *x: call(*x, **given))(*x))  # noqa: E731
    assert traced(SPLIT) == traced(decode_attention)
    with jax.set_mesh(make_mesh()):
        assert 'shard_map' not in traced(SPLIT)
    with jax.set_mesh(make_mesh(tensor=2)):
        assert 'shard_map' in traced(SPLIT)


@pytest.mark.parametrize(
    ('axes', 'message'),
    [
        (
            {'heads': 'tensor'},
            "heads='tensor': the 6 heads of q must be a multiple of 4, the devices along the axis; "
            'try 8',
        ),
        (
            {'batch': ('data', 'expert')},
            "batch='expert': is no axis of the mesh, which has 'data', 'fsdp', 'tensor'; try "
            "batch='data'",
        ),
    ],
)
def test_what_does_not_fit_the_mesh(axes, message):
    q, k, v, lengths_B, _ = operands(H=6)
    with jax.set_mesh(make_mesh(tensor=4)), pytest.raises(ValueError, match='; try ') as caught:
        shard_decode(**axes)(q, k, v, lengths_B=lengths_B)
    assert str(caught.value) == message


@pytest.mark.slow
def test_over_four_chips_the_cache_is_neither_moved_nor_copied():
    rows = ahead_of_time.printed('compile_decode_sharded.py', 'v5e')
    assert len(rows) == 4
    for row in rows:
        assert row['kernels'] == 1, row
        assert row['collectives'] == [], row
        assert row['temp_bytes'] < row['cache_bytes'] / 16, row
