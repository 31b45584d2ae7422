"""Attention over a context axis, by a ring or by gathering, is that of one device, shared out."""

import collections
import math
import re

import ahead_of_time
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import attention
from pallas_kernels.attention.arguments import Spec, check_arguments
from pallas_kernels.attention.layouts import route, unzigzag, zigzag
from pallas_kernels.attention.ring import Ring
from pallas_kernels.attention.sharded import shard

B, T, H, K, D, N = 2, 32, 4, 2, 8, 4


def make_mesh(**sizes):
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


def draw(seed, *shape, dtype=None):
    x = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(x, dtype or jnp.float32)


def qkv(S=T, rows=B, dtype=None):
    shapes = (rows, T, H, D), (rows, S, K, D), (rows, S, K, D)
    return [draw(n, *shape, dtype=dtype) for n, shape in enumerate(shapes)]


def zigzagged(function, devices=N):
    """Returns `function` on arrays in the sequence's order, computed in the zigzag layout."""

    def order(name, x, move):
        for axis in {'mask': (2, 3), 'bias': (2, 3), 'sinks': (), 'dropout_seed': ()}.get(
            name, (1,)
        ):
            x = move(x, devices, axis=axis) if x.shape[axis] > 1 else x
        return x

    def run(*arrays, **features):
        moved = {
            n: order(n, x, zigzag) if isinstance(x, jax.Array) else x for n, x in features.items()
        }
        results = function(*(zigzag(x, devices) for x in arrays), **moved)
        if not features.get('return_lse'):
            return unzigzag(results, devices)
        return unzigzag(results[0], devices), unzigzag(results[1], devices, axis=2)

    return run


def value_and_grads(function, arrays, varied, **rest):
    """Returns a loss of o and lse, both of these, and the gradients of arrays and varied."""
    weights = draw(9, *arrays[0].shape[:3], arrays[2].shape[3])

    def loss(arrays, varied):
        o, lse = function(*arrays, **varied, **rest, return_lse=True)
        finite = jnp.where(jnp.isfinite(lse), lse, 0)
        return (o * weights).sum() + jnp.sin(finite).sum(), (o, lse)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(arrays, varied)


def assert_equal(got, want, atol=2e-5):
    got, want = jax.device_get((got, want))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-5), got, want)


def everything(S=T):
    """Every optional array, so that some rows see nothing but their sink."""
    rng = np.random.default_rng(3)
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (B, max(S, T))), axis=1), jnp.int32)
    rest = {
        'segment_ids': ids[:, -T:],
        'kv_segment_ids': ids[:, -S:],
        'mask': jnp.asarray(rng.random((B, 1, T, S)) < 0.8),
        'dropout_seed': jnp.int32(5),
        'dropout_rate': 0.25,
        'softcap': 3.0,
    }
    return {'sinks': draw(5, H), 'bias': draw(4, 1, H, T, S)}, rest


@pytest.mark.parametrize(
    ('exchange', 'impl', 'layout', 'S', 'band'),
    [
        ('ring', 'xla', 'zigzag', T, {'causal': True}),
        ('ring', 'xla', 'contiguous', 2 * T, {'causal': True, 'window': (11, None)}),
        ('ring', 'reference', 'zigzag', 2 * T, {'window': (6, 3)}),
        ('gather', 'xla', 'zigzag', T, {'causal': True}),
        ('gather', 'reference', 'contiguous', 2 * T, {'causal': True, 'window': (11, None)}),
    ],
)
def test_everything_equals_one_device(exchange, impl, layout, S, band):
    arrays, (varied, rest) = qkv(S), everything(S)
    want = value_and_grads(attention, arrays, varied, **rest, **band, impl='xla')
    ring = shard(batch='data', context='context', layout=layout, exchange=exchange)
    ring = zigzagged(ring) if layout == 'zigzag' else ring
    with jax.set_mesh(make_mesh(data=2, context=N)):
        got = value_and_grads(ring, arrays, varied, **rest, **band, impl=impl)
    assert_equal(got, want)


@pytest.mark.parametrize(
    'arguments',
    [
        {},
        {'causal': True},
        {'window': (3, 9)},
        {'window': (0, None), 'bias': 'of keys', 'mask': 'of keys'},
    ],
    ids=['full', 'causal', 'both sides', 'right'],
)
def test_contiguous_ring_without_sinks(arguments):
    # Rows that see nothing at all are in the last case: the mask hides the last keys.
    varied, rest = {}, dict(arguments)
    if 'bias' in arguments:
        varied = {'bias': draw(4, B, 1, 1, T)}
        rest |= {'mask': jnp.broadcast_to(jnp.arange(T)[None, None, None] < T - 3, (B, 1, 1, T))}
        del rest['bias']
    arrays = qkv()
    want = value_and_grads(attention, arrays, varied, **rest, impl='xla')
    with jax.set_mesh(make_mesh(context=N)):
        got = value_and_grads(shard(context='context'), arrays, varied, **rest, impl='xla')
    assert_equal(got, want)


def test_float64_oracle():
    with jax.enable_x64(True):
        arrays = qkv(dtype=jnp.float64)
        varied = {'sinks': draw(5, H, dtype=jnp.float64)}
        want = value_and_grads(attention, arrays, varied, causal=True, impl='reference')
        ring = zigzagged(shard(context='context', layout='zigzag'))
        with jax.set_mesh(make_mesh(context=N)):
            got = value_and_grads(ring, arrays, varied, causal=True, impl='xla')
        assert_equal(got, want, atol=1e-12)


def test_bfloat16_is_as_good_as_without_a_ring():
    arrays = qkv(dtype=jnp.bfloat16)
    exact = attention(*(x.astype(jnp.float32) for x in arrays), causal=True, impl='reference')
    error = lambda o: np.abs(np.asarray(o, np.float32) - exact).max()  # noqa: E731
    one = error(attention(*arrays, causal=True, impl='xla'))
    with jax.set_mesh(make_mesh(context=N)):
        ring = jax.jit(lambda x: shard(context='context')(*x, causal=True, impl='xla'))(arrays)
    assert error(ring) <= 2 * one + 1e-3


@pytest.mark.parametrize('exchange', ['ring', 'gather'])
def test_within_shard_map_with_checked_types(exchange):
    # The mask and the bias keep the columns of all keys; what is shared gets the sum.
    arrays, varied = qkv(), {'sinks': draw(5, H), 'bias': draw(4, 1, 1, T, T)}
    want = value_and_grads(attention, arrays, varied, causal=True, impl='xla')
    ring = shard(context='context', layout='zigzag', exchange=exchange)
    row = P(None, 'context')

    def mapped(q, k, v, *, sinks, bias, return_lse):
        return jax.shard_map(
            lambda q, k, v, sinks, bias: ring(
                q, k, v, sinks=sinks, bias=bias, causal=True, impl='xla', return_lse=return_lse
            ),
            in_specs=(row, row, row, P(), P(None, None, 'context')),
            out_specs=(row, P(None, None, 'context')),
            check_vma=True,
        )(q, k, v, sinks, bias)

    with jax.set_mesh(make_mesh(context=N)):
        got = value_and_grads(zigzagged(mapped), arrays, varied)
    assert_equal(got, want)


def test_mask_within_shard_map_needs_all_columns():
    def mapped(q, mask):
        return shard(context='context')(q, q, q, mask=mask, impl='xla')

    row = P(None, 'context')
    with (
        jax.set_mesh(make_mesh(context=N)),
        pytest.raises(ValueError, match='; try in_specs') as caught,
    ):
        jax.eval_shape(
            jax.shard_map(mapped, in_specs=(row, P(None, None, 'context')), out_specs=row),
            jax.ShapeDtypeStruct((B, T, H, D), jnp.float32),
            jax.ShapeDtypeStruct((B, 1, T, T // N), jnp.bool_),
        )
    assert str(caught.value) == (
        "mask=bool[2, 1, 8, 8]: in a shard_map over 'context' it must have the columns of all 32 "
        'keys, or one; try in_specs that do not split its last dimension'
    )


def test_vmap():
    arrays = jax.tree.map(lambda x: jnp.stack([x, -x]), qkv(rows=1))
    run = lambda f: jax.jit(jax.vmap(lambda x: f(*x, causal=True, impl='xla')))(arrays)  # noqa: E731
    want = run(attention)
    with jax.set_mesh(make_mesh(context=N)):
        assert_equal(run(zigzagged(shard(context='context', layout='zigzag'))), want)


@pytest.mark.parametrize('exchange', ['ring', pytest.param('gather', marks=pytest.mark.slow)])
def test_tpu_kernels_interpreted(exchange):
    arrays, varied = qkv(), {'sinks': draw(5, H)}
    rest = {'segment_ids': everything()[1]['segment_ids'], 'causal': True}
    want = value_and_grads(attention, arrays, varied, **rest, impl='xla')
    ring = zigzagged(shard(context='context', layout='zigzag', exchange=exchange), 2)
    with jax.set_mesh(make_mesh(context=2)):
        got = value_and_grads(ring, arrays, varied, **rest, impl='tpu')
    assert_equal(got, want)


def spec(causal=False, window=(None, None), shift=0):
    return Spec(causal, window, softcap=None, dropout_rate=0.0, scale=1.0, shift=shift)


class Counting:
    """An implementation whose sum of exponentials is the number of pairs computed for a row."""

    @staticmethod
    def forward(operands, spec, block_sizes):
        del spec, block_sizes
        return operands.q_BTHD, jnp.zeros_like(operands.q_BTHD[..., 0].swapaxes(1, 2))


@pytest.mark.parametrize(('layout', 'pairs'), [('contiguous', [1, 2, 3, 4]), ('zigzag', [9] * 4)])
def test_pairs_of_chunks_that_each_device_computes(layout, pairs):
    operands, _ = check_arguments(*qkv())
    causal = spec(causal=True)
    assert route(causal, layout, N, T // N, T // N).pairs().sum(0).tolist() == pairs
    run = jax.shard_map(
        lambda x: Ring(Counting, 'context', layout).forward(x, causal)[1],
        mesh=make_mesh(context=N),
        in_specs=P(None, 'context'),
        out_specs=P(None, None, 'context'),
    )
    lse_BHT = jax.jit(run)(operands)
    chunks = {'contiguous': 1, 'zigzag': 2}[layout]
    counted = np.exp(lse_BHT[0, 0]).reshape(N, chunks, -1)[..., 0].sum(1)
    np.testing.assert_allclose(counted, pairs, rtol=1e-5)


def test_zigzag_shares_out_every_step():
    assert route(spec(causal=True), 'zigzag', 8, 4, 4).pairs().tolist() == [[3] * 8] + [[2] * 8] * 7


@pytest.mark.parametrize(
    ('arguments', 'first', 'steps'),
    [
        ({'causal': True}, 0, 8),
        ({'causal': True, 'window': (16, 0)}, 0, 3),
        ({'causal': True, 'window': (17, 0)}, 0, 4),
        ({'window': (0, 8)}, 7, 2),
        ({'window': (8, 16)}, 6, 4),
        ({'window': (0, 0), 'shift': 80}, 0, 0),
    ],
)
def test_no_device_is_visited_that_nobody_sees(arguments, first, steps):
    # Eight keys a device: a window of 16 ends with the second device before, one of 17 does not.
    way = route(spec(**arguments), 'contiguous', 8, 8, 8)
    assert (way.first, way.steps) == (first, steps)


def test_zigzag_and_back():
    x = jnp.arange(24).reshape(2, 12)
    assert zigzag(x, 3)[0].tolist() == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    assert unzigzag(zigzag(x.T, 3, axis=-2), 3, axis=0).tolist() == x.T.tolist()
    with pytest.raises(ValueError, match='; try ') as caught:
        zigzag(x, 4)
    assert str(caught.value) == (
        'x.shape[1]=12: must be a multiple of 8, two chunks for each of 4 devices; try 16'
    )


def test_gathering_sends_each_key_once_to_a_device_and_each_gradient_once():
    operation = shard(context='context', layout='zigzag', exchange='gather')
    loss = lambda x: operation(*x, causal=True, impl='xla').sum()  # noqa: E731
    placed = NamedSharding(make_mesh(context=N), P(None, 'context'))
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed) for x in qkv()]
    with jax.set_mesh(placed.mesh):
        text = jax.jit(jax.grad(loss)).lower(arrays).compile().as_text()
    found = collections.Counter(
        (kind, math.prod(map(int, shape.split(','))))
        for shape, kind in re.findall(r'= f32\[([\d,]+)\]\S* (all-\w+|reduce-scatter)\(', text)
    )
    # Keys and values, once for each pass; the gradients of both.
    assert found == {('all-gather', B * T * K * D): 4, ('reduce-scatter', B * T // N * K * D): 2}


def test_unknown_exchange():
    with pytest.raises(ValueError, match='try exchange=') as caught:
        shard(context='context', exchange='all')
    assert str(caught.value) == "exchange='all': must be 'ring' or 'gather'; try exchange='ring'"


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v6e:2x2'])
def test_compiles_for_four_chips_that_are_not_there(topology):
    (report,) = ahead_of_time.printed('compile_ring.py', topology)
    # A kernel in the loop of each pass, and one in the step that stands outside it.
    assert report['kernels'] == 4
    # Forward, keys and values; backward, these twice and their gradients twice: all but the last,
    # which brings gradients home, run beside kernels.
    assert (report['transfers'], report['hidden']) == (10, 8)
    # Nothing of the size of a device's queries times its keys, of one head, is in memory.
    assert report['temp_bytes'] < report['square_bytes'] / 4
