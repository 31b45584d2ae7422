"""Attention over batch and head axes of a mesh is that of one device, gradients and all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import attention
from pallas_kernels.attention.sharded import shard

B, T, D = 4, 16, 8
SPLIT = shard(batch='data', heads='tensor')


def make_mesh(kind=AxisType.Auto, **sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def qkv(H=4, K=4, rows=B, length=T):
    keys = [draw(rows, length, K, D, seed=n) for n in (1, 2)]
    return draw(rows, length, H, D), *keys


def qkv_shapes(H, K, rows, length):
    shapes = (rows, length, H, D), (rows, length, K, D), (rows, length, K, D)
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


def everything(H=4, rows=B, length=T):
    """Every optional argument that has an array, in its most varied broadcasts."""
    rng = np.random.default_rng(3)
    ids = np.sort(rng.integers(0, 3, (rows, length)), axis=1)
    return {
        'bias': draw(1, H, length, length, seed=4),
        'sinks': draw(H, seed=5),
        'segment_ids': jnp.asarray(ids, jnp.int32),
        'mask': jnp.asarray(rng.random((rows, 1, 1, length)) < 0.9),
        'dropout_seed': jnp.int32(11),
    }


STATIC = {'causal': True, 'window': (9, None), 'softcap': 4.0, 'dropout_rate': 0.25}


def value_and_grads(function, arrays, features, **static):
    """Returns a loss of o and lse, and its gradients in q, k, v, bias and sinks."""
    varied = {n: x for n, x in features.items() if n in ('bias', 'sinks')}
    rest = {n: x for n, x in features.items() if n not in varied}
    weights = draw(*arrays[0].shape[:3], arrays[2].shape[3], seed=9)

    def loss(arrays, varied, rest):
        o, lse = function(*arrays, **varied, **rest, **static, return_lse=True)
        return (o * weights).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum(), (o, lse)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(arrays, varied, rest)


def assert_equal(got, want, atol=2e-5):
    got, want = jax.device_get((got, want))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-5), got, want)


@pytest.mark.parametrize(
    ('impl', 'sizes', 'H', 'K', 'rows'),
    [
        ('xla', {'data': 4, 'tensor': 2}, 4, 2, B),
        ('xla', {'data': 2, 'tensor': 4}, 8, 2, B),  # a group's two devices share a head
        (
            'xla',
            {'data': 2, 'tensor': 4},
            12,
            6,
            1,
        ),  # devices of three heads, groups of two; a row for all
        ('reference', {'data': 2, 'tensor': 2, 'other': 2}, 4, 1, B),
    ],
)
def test_everything_equals_one_device(impl, sizes, H, K, rows):
    arrays, features = qkv(H, K, rows), everything(H, rows)
    want = value_and_grads(attention, arrays, features, **STATIC, impl='reference')
    with jax.set_mesh(make_mesh(**sizes)):
        got = value_and_grads(SPLIT, arrays, features, **STATIC, impl=impl)
    assert_equal(got, want)


def test_explicit_axes():
    arrays, features = qkv(H=4, K=1), everything()
    want = value_and_grads(attention, arrays, features, **STATIC, impl='xla')
    with jax.set_mesh(make_mesh(AxisType.Explicit, data=4, tensor=2)):
        got = value_and_grads(SPLIT, arrays, features, **STATIC, impl='xla')
    assert_equal(got, want)


@pytest.mark.parametrize('manual', [{'data'}, {'data', 'tensor'}])
def test_within_shard_map_with_checked_types(manual):
    arrays, features = qkv(H=4, K=2), everything()
    want = value_and_grads(attention, arrays, features, **STATIC, impl='xla')
    heads = 'tensor' if 'tensor' in manual else None
    specs = {
        'bias': P(None, heads),
        'sinks': P(heads),
        'segment_ids': P('data'),
        'mask': P('data'),
        'dropout_seed': P(),
    }
    row = P('data', None, heads)

    def mapped(q, k, v, *, bias, sinks, segment_ids, mask, dropout_seed, **static):
        given = {'bias': bias, 'sinks': sinks, 'segment_ids': segment_ids}
        given |= {'mask': mask, 'dropout_seed': dropout_seed}
        static.pop('return_lse')
        return jax.shard_map(
            lambda q, k, v, given: SPLIT(q, k, v, **given, **static, return_lse=True),
            in_specs=(row, row, row, specs),
            out_specs=(row, P('data', heads)),
            axis_names=manual,
        )(q, k, v, given)

    with jax.set_mesh(make_mesh(data=4, tensor=2)):
        got = value_and_grads(mapped, arrays, features, **STATIC, impl='xla')
    assert_equal(got, want)


def test_dropout_has_the_bits_of_one_device():
    # With equal weights and values of one, a query's output counts the keys that were kept.
    q, k, v = (
        jnp.zeros((B, T, 4, D)),
        jnp.zeros((B, T, 4, D)),
        jnp.broadcast_to(jnp.eye(T)[None, :, None], (B, T, 4, T)),
    )
    arguments = {'dropout_rate': 0.5, 'dropout_seed': 3, 'impl': 'xla'}
    kept = attention(q, k, v, **arguments) > 0
    with jax.set_mesh(make_mesh(data=4, tensor=2)):
        kept_here = jax.jit(lambda *x: SPLIT(*x, **arguments))(q, k, v) > 0
    assert 0.4 < kept.mean() < 0.6
    np.testing.assert_array_equal(kept, kept_here)


def test_nothing_is_communicated_but_gradients_of_what_is_shared():
    arrays = qkv()
    mesh = make_mesh(data=4, tensor=2)
    split = NamedSharding(mesh, P('data', None, 'tensor'))
    arrays = jax.device_put(arrays, split)

    def loss(arrays, sinks):
        return SPLIT(*arrays, causal=True, sinks=sinks, impl='xla').sum()

    with jax.set_mesh(mesh):
        forward = jax.jit(lambda x: SPLIT(*x, causal=True, impl='xla')).lower(arrays).compile()
        assert forward.output_shardings.is_equivalent_to(split, 4)
        gradient = jax.jit(jax.grad(loss, (0, 1))).lower(arrays, jnp.zeros(4)).compile()
    for collective in 'all-reduce', 'all-gather', 'all-to-all', 'collective-permute':
        assert collective not in forward.as_text()
    text = gradient.as_text()
    assert 'all-reduce' in text
    assert 'all-gather' not in text
    assert 'all-to-all' not in text


def test_vmap_and_second_derivative():
    arrays = qkv(H=2, K=1, rows=2)

    def hessian_product(function, arrays):
        gradient = jax.grad(lambda x: (function(*x, causal=True, impl='xla') ** 2).sum())
        return jax.grad(lambda x: sum((g**2).sum() for g in gradient(x)))(arrays)

    def run(function):
        stacked = jax.tree.map(lambda x: jnp.stack([x, x / 2]), arrays)
        return jax.jit(jax.vmap(lambda x: hessian_product(function, x)))(stacked)

    want = run(attention)
    with jax.set_mesh(make_mesh(data=2, tensor=2)):
        assert_equal(run(SPLIT), want, atol=2e-3)


def test_without_a_mesh_it_is_attention():
    arrays = qkv_shapes(4, 2, B, T)
    traced = lambda f: str(jax.make_jaxpr(lambda *x: f(*x, causal=True))(*arrays))  # noqa: E731
    assert traced(SPLIT) == traced(attention)
    with jax.set_mesh(make_mesh(data=1, tensor=1)):
        assert 'shard_map' not in traced(SPLIT)
    with jax.set_mesh(make_mesh(data=1, tensor=2)):
        assert 'shard_map' in traced(SPLIT)


def test_tpu_kernels_interpreted():
    arrays = qkv(H=4, K=2)
    features = {'sinks': draw(4, seed=5), 'segment_ids': everything()['segment_ids']}
    want = value_and_grads(attention, arrays, features, causal=True, impl='reference')
    with jax.set_mesh(make_mesh(data=2, tensor=4)):
        got = value_and_grads(SPLIT, arrays, features, causal=True, impl='tpu')
    assert_equal(got, want)


@pytest.mark.parametrize(
    ('axes', 'shape', 'message'),
    [
        (
            {'batch': ('data', 'fsdp')},
            (B, T, 4, 4),
            "batch='fsdp': is no axis of the mesh, which has 'data', 'tensor'; try batch='data'",
        ),
        (
            {'heads': 'tensor'},
            (B, T, 3, 3),
            "heads='tensor': the 3 heads of q must be a multiple of 2, the devices along the axis; "
            'try 4',
        ),
        (
            {'batch': 'data'},
            (6, T, 4, 4),
            "batch='data': the 6 batch rows must be a multiple of 4, the devices along the axis; "
            'try 8',
        ),
        (
            {'context': 'data'},
            (B, 18, 4, 4),
            "context='data': the 18 positions of q must be a multiple of 4, the devices along the "
            'axis; try 16',
        ),
        (
            {'context': 'data', 'layout': 'zigzag'},
            (B, 20, 4, 4),
            "context='data': the 20 positions of q must be a multiple of 8, two chunks a device; "
            'try 16',
        ),
    ],
)
def test_what_does_not_fit_the_mesh(axes, shape, message):
    rows, length, H, K = shape
    with (
        jax.set_mesh(make_mesh(data=4, tensor=2)),
        pytest.raises(ValueError, match='; try ') as caught,
    ):
        jax.eval_shape(shard(**axes), *qkv_shapes(H, K, rows, length))
    assert str(caught.value) == message


def test_axes_that_contradict_each_other():
    with pytest.raises(ValueError, match='; try ') as caught:
        shard(batch='data', heads='data')
    assert str(caught.value) == (
        "batch=('data',), heads=('data',), context=(): axis 'data' splits two dimensions; try "
        'context=None'
    )
    with pytest.raises(ValueError, match='; try ') as caught:
        shard(context='data', layout='striped')
    assert str(caught.value) == (
        "layout='striped': must be 'contiguous' or 'zigzag'; try layout='zigzag'"
    )


def test_a_kernel_that_refuses_says_so_before_it_is_split(monkeypatch):
    from pallas_kernels.attention import xla

    seen = []
    monkeypatch.setattr(xla, 'refuses', lambda operands, spec: seen.append(operands) or 'not today')
    with (
        jax.set_mesh(make_mesh(data=4, tensor=2)),
        pytest.raises(ValueError, match='; try ') as caught,
    ):
        jax.eval_shape(lambda *x: SPLIT(*x, impl='xla'), *qkv_shapes(4, 1, B, T))
    assert str(caught.value) == "impl='xla': not today; try impl='xla'"
    assert seen[0].q_BTHD.shape == (B // 4, T, 4 // 2, D)
    assert seen[0].k_BSKD.shape == (B // 4, T, 1, D)
