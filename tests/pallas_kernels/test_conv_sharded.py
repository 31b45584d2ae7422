"""Convolutions of arrays that are split over a mesh: the same values and gradients, and no more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.conv import conv1d, conv2d, gated_conv1d, shard

AXES = {'batch': 'data', 'rows': 'rows', 'cols': 'cols', 'channels': 'tensor'}


def mesh(types=AxisType.Auto, **sizes):
    named = {name: sizes.get(name, 1) for name in AXES.values()}
    devices = jax.devices()[: int(np.prod([*named.values()]))]
    return jax.make_mesh(
        tuple(named.values()), tuple(named), axis_types=(types,) * len(named), devices=devices
    )


def draw(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def value_and_gradients(function, *arrays, **features):
    """The result, and the gradients of a sum with random weights."""

    def loss(*arrays):
        y = function(*arrays, **features)
        return (y * draw(*y.shape)).sum(), y

    (_, y), gradients = jax.jit(
        jax.value_and_grad(loss, argnums=tuple(range(len(arrays))), has_aux=True)
    )(*arrays)
    return y, *gradients


def assert_same(got, want):
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-4)


CASES = {
    'rows and columns': ({'rows': 2, 'cols': 2}, (3, 3), 8, {}),
    'all four': ({'data': 2, 'rows': 2, 'tensor': 2}, (3, 3), 8, {}),
    'strides': ({'rows': 4, 'cols': 2}, (7, 3), 8, {'stride': 2}),
    'stride wider than the kernel': ({'rows': 2, 'cols': 2}, (1, 1), 8, {'stride': 2}),
    'neighbours of neighbours': ({'rows': 4, 'cols': 2}, (3, 3), 8, {'dilation': 4}),
    'beyond all parts': ({'rows': 4}, (3, 1), 8, {'dilation': (16, 1)}),
    'depthwise': ({'rows': 2, 'tensor': 4}, (3, 3), 1, {'groups': 8}),
    'groups': ({'data': 2, 'cols': 2, 'tensor': 2}, (3, 3), 2, {'groups': 4}),
    'padding on one side': ({'rows': 2, 'cols': 2}, (3, 3), 8, {'padding': ((2, 0), (0, 2))}),
}


@pytest.mark.parametrize('name', CASES)
def test_parts_make_what_the_whole_does(name):
    sizes, taps, deep, features = CASES[name]
    arrays = draw(2, 16, 8, 8), draw(*taps, deep, 8), draw(8)
    call = lambda f: lambda x, w, b, **k: f(x, w, bias=b, activation='silu', impl='xla', **k)  # noqa: E731
    want = value_and_gradients(call(conv2d), *arrays, **features)
    with jax.set_mesh(mesh(**sizes)):
        got = value_and_gradients(call(shard(**AXES).conv2d), *arrays, **features)
    assert_same(got, want)


@pytest.mark.parametrize('impl', ['xla', 'tpu'])
def test_a_sequence_with_segments_residuals_of_no_neighbour(impl):
    x_BTC, w_KDO = draw(2, 32, 8), draw(3, 1, 8)
    ids = jnp.asarray(np.arange(32)[None] // np.array([[7], [11]]), jnp.int32)
    features = {'padding': 'CAUSAL', 'dilation': 3, 'groups': 8, 'segment_ids': ids, 'impl': impl}
    want = value_and_gradients(conv1d, x_BTC, w_KDO, **{**features, 'impl': 'reference'})
    with jax.set_mesh(mesh(data=2, cols=4)):
        got = value_and_gradients(shard(**AXES).conv1d, x_BTC, w_KDO, **features)
    assert_same(got, want)


def test_kernels_interpreted_with_residual_and_scale():
    x, w, more = draw(2, 8, 8, 8), draw(3, 3, 8, 8), draw(2, 8, 8, 8)
    features = {'scale_shift': (draw(8), draw(8)), 'activation': 'relu'}
    call = lambda f, impl: lambda x, w, r: f(x, w, residual=r, impl=impl, **features)  # noqa: E731
    want = value_and_gradients(call(conv2d, 'reference'), x, w, more)
    with jax.set_mesh(mesh(data=2, rows=2)):
        got = value_and_gradients(call(shard(**AXES).conv2d, 'tpu'), x, w, more)
    assert_same(got, want)


GATED = {
    'gates': ({'tensor': 4}, AxisType.Auto),
    'batch and gates': ({'data': 2, 'tensor': 2}, AxisType.Explicit),
}


@pytest.mark.parametrize('name', GATED)
def test_the_gated_units_parts_make_what_the_whole_does(name):
    sizes, types = GATED[name]
    arrays = {
        'x_BTC': draw(2, 20, 8), 'w_KCF': draw(2, 8, 16), 'w_residual_GC': draw(8, 8),
        'w_skip_GS': draw(8, 4), 'bias_F': draw(16), 'bias_residual_C': draw(8),
        'bias_skip_S': draw(4), 'state': draw(2, 3, 8),
    }  # fmt: skip
    ids = jnp.asarray(np.arange(20)[None] // np.array([[7], [11]]), jnp.int32)
    weights = draw(2, 20, 8), draw(2, 20, 4)

    def run(function, impl):
        def outputs(arrays):
            features = {'dilation': 3, 'segment_ids': ids, 'return_state': True, 'impl': impl}
            *made, state = function(**arrays, **features)
            return sum((x * w).sum() for x, w in zip(made, weights, strict=True)), (made, state)

        return jax.jit(jax.value_and_grad(outputs, has_aux=True))(arrays)

    want = run(gated_conv1d, 'reference')
    with jax.set_mesh(mesh(types, **sizes)):
        got = run(shard(batch='data', channels='tensor').gated_conv1d, 'tpu')
    assert_same(*map(jax.tree.leaves, (got, want)))


def test_a_gated_unit_that_does_not_fit_the_mesh():
    arrays = draw(2, 20, 8), draw(2, 8, 12), draw(6, 8), draw(6, 4)
    with jax.set_mesh(mesh(tensor=4, cols=2)):
        with pytest.raises(ValueError, match=r"^channels='tensor': the 6 gate channels .* try 8$"):
            shard(channels='tensor').gated_conv1d(*arrays, impl='tpu')
        with pytest.raises(ValueError, match=r"^cols='cols': the gated unit splits .* cols=None$"):
            shard(cols='cols').gated_conv1d(*arrays, impl='tpu')


def test_explicit_axes():
    x, w = draw(2, 8, 4, 4), draw(3, 3, 4, 4)
    want = value_and_gradients(conv2d, x, w, impl='xla')
    where = mesh(AxisType.Explicit, rows=4)
    with jax.set_mesh(where):
        placed = jax.device_put(x, NamedSharding(where, P(None, 'rows')))
        y, vjp = jax.vjp(lambda *arrays: shard(**AXES).conv2d(*arrays, impl='xla'), placed, w)
        cotangent = jax.sharding.reshard(draw(*y.shape), jax.typeof(y).sharding.spec)
        gradients = vjp(cotangent)
    assert_same((y, *gradients), want)


def test_second_derivatives():
    x, w = draw(2, 8, 4, 4), draw(3, 3, 4, 4)

    def curvature(function):
        slope = jax.grad(lambda x: jnp.sum(function(x, w, impl='xla') ** 3))
        return jax.jit(jax.grad(lambda x: jnp.sum(slope(x) ** 2)))

    want = curvature(conv2d)(x)
    with jax.set_mesh(mesh(rows=4)):
        got = curvature(shard(**AXES).conv2d)(x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-2)


def test_only_edges_travel():
    x, w = jnp.zeros((2, 32, 8, 8)), jnp.zeros((3, 3, 8, 8))
    where = mesh(data=2, rows=4)
    placed = NamedSharding(where, P('data', 'rows'))
    with jax.set_mesh(where):
        function = jax.jit(lambda x, w: shard(**AXES).conv2d(x, w, impl='xla'))
        text = function.lower(jax.device_put(x, placed), w).compile().as_text()
    assert 'collective-permute' in text
    for collective in ('all-gather', 'all-reduce', 'all-to-all'):
        assert collective not in text


def test_without_a_mesh_it_is_the_function_itself():
    x, w = draw(1, 4, 4, 2), draw(3, 3, 2, 2)
    np.testing.assert_array_equal(shard(batch='data').conv2d(x, w), conv2d(x, w))


@pytest.mark.parametrize(
    ('axes', 'features', 'message'),
    [
        (
            {'rows': 'rows'},
            {'padding': 'VALID'},
            "rows='rows': splits outputs as it splits inputs, so H / stride of them must remain, "
            "and of 8 / 1 there are 6; try padding='SAME'",
        ),
        (
            {'rows': 'rows'},
            {'stride': 4},
            "rows='rows': the 2 H / stride must be a multiple of 4, the devices along the axis; "
            'try 4',
        ),
        (
            {'channels': 'rows'},
            {'groups': 2},
            "channels='rows': the 2 groups must be a multiple of 4, the devices along the axis; "
            'try 4',
        ),
        (
            {'batch': 'sequence'},
            {},
            "batch='sequence': is no axis of the mesh, which has 'data', 'rows', 'cols', 'tensor'; "
            "try batch='data'",
        ),
    ],
)
def test_what_does_not_fit_the_mesh(axes, features, message):
    x, w = jnp.zeros((2, 8, 8, 8)), jnp.zeros((3, 3, 8 // features.get('groups', 1), 8))
    with jax.set_mesh(mesh(rows=4)), pytest.raises(ValueError) as error:  # noqa: PT011
        shard(**axes).conv2d(x, w, **features)
    assert str(error.value) == message


def test_axes_that_contradict_each_other_and_a_state_that_is_elsewhere():
    with pytest.raises(ValueError, match=r"axis 'data' splits two dimensions; try rows=None$"):
        shard(batch='data', rows='data')
    with pytest.raises(ValueError, match=r"^rows=\('a', 'b'\): must be one axis; try rows='a'$"):
        shard(rows=('a', 'b'))
    with pytest.raises(ValueError, match=r"must be None where cols='cols' splits the positions"):
        shard(cols='cols').conv1d(
            draw(1, 4, 2), draw(2, 1, 2), groups=2, padding='CAUSAL', state=draw(1, 1, 2)
        )
