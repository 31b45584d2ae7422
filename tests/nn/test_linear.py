"""Dense: value against einsum, shapes, and what it refuses; an embedding's logits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import collectives

from bigjax import sharding
from bigjax.nn.constrain import constrain, leave
from bigjax.nn.linear import Dense, embedding_logits
from bigjax.nn.remat import policy


@pytest.mark.parametrize(
    ('shape', 'features', 'in_dims', 'spec'),
    [
        ((6,), 5, 1, 'i,io->o'),
        ((2, 3, 6), 5, 1, 'bti,io->bto'),
        ((2, 3, 8), (2, 3, 4), 1, 'btc,chkd->bthkd'),
        ((2, 3, 2, 4), 8, 2, 'bthd,hdc->btc'),
    ],
)
def test_dense_equals_einsum_plus_bias(shape, features, in_dims, spec):
    x = jax.random.normal(jax.random.key(0), shape)
    layer = Dense(features, in_dims=in_dims, bias_init=jax.nn.initializers.normal(1.0))
    params = layer.init(jax.random.key(1), x)['params']
    out_shape = (features,) if isinstance(features, int) else features
    assert params['kernel'].shape == (*shape[-in_dims:], *out_shape)
    assert params['bias'].shape == out_shape
    want = jnp.einsum(spec, x, params['kernel'])
    want += jnp.broadcast_to(params['bias'], want.shape)
    np.testing.assert_allclose(layer.apply({'params': params}, x), want, rtol=1e-5, atol=1e-5)


def test_fan_in_of_the_initializer_counts_all_contracted_dimensions():
    layer = Dense((20, 20), in_dims=2)
    kernel = layer.init(jax.random.key(0), jnp.zeros((1, 10, 40)))['params']['kernel']
    assert kernel.std() == pytest.approx(1 / 20, rel=0.02)


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
    layer = Dense(4, dtype=jnp.bfloat16)
    params = layer.init(jax.random.key(0), jnp.ones((2, 3)))['params']
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('float32')}
    assert layer.apply({'params': params}, jnp.ones((2, 3))).dtype == jnp.bfloat16


def test_no_bias_means_no_bias_parameter():
    assert set(Dense(4, use_bias=False).init(jax.random.key(0), jnp.ones((1, 3)))['params']) == {
        'kernel'
    }


def test_more_input_dimensions_than_the_input_has_is_refused():
    with pytest.raises(ValueError, match='in_dims=3: the input has 2 dimensions'):
        Dense(4, in_dims=3).init(jax.random.key(0), jnp.ones((2, 3)))


def test_no_gradient_of_the_output_layer_waits_for_what_follows_it():
    """XLA may keep logits for the table's gradient through all layers, unless it is told not to."""
    x_NC, table_VC = jnp.ones((4, 8)), jnp.arange(40.0).reshape(5, 8)

    def loss(x_NC, table_VC):
        return jnp.sum(jnp.sin(embedding_logits(x_NC, table_VC)))

    def plain(x_NC, table_VC):
        return jnp.sum(jnp.sin(x_NC @ table_VC.T))

    lowered = jax.jit(jax.grad(loss, (0, 1))).lower(x_NC, table_VC).as_text()
    barriers = [line for line in lowered.splitlines() if 'optimization_barrier' in line]
    assert len(barriers) == 1
    assert 'tensor<4x8xf32>, tensor<5x8xf32>' in barriers[0]
    assert 'optimization_barrier' not in jax.jit(loss).lower(x_NC, table_VC).as_text()
    for got, want in zip(
        *(jax.grad(f, (0, 1))(x_NC, table_VC) for f in (loss, plain)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


class Added(nn.Module):
    """What half a block adds to the stream: B 8, T 16, of M 64, in heads or not."""

    reads: str | None
    in_dims: int = 1
    width: int = 32

    @nn.compact
    def __call__(self, h):
        h = constrain(jnp.sin(h), 'batch', 'length', 'mlp', *[None] * (self.in_dims - 1))
        dense = Dense(self.width, in_dims=self.in_dims, reads=self.reads, use_bias=False)
        return jnp.sin(leave(dense(h)))


def added(reads, shape, width=32, keeps=None):
    kind = nn.remat(Added, policy=policy(keeps)) if keeps else Added
    model = kind(reads, len(shape) - 2, width)
    h = jax.random.normal(jax.random.key(1), shape)

    def step(params, h):
        loss = lambda params, h: jnp.sum(jnp.sin(model.apply({'params': params}, h)))  # noqa: E731
        return jax.value_and_grad(loss, (0, 1))(params, h)

    return step, model.init(jax.random.key(0), h)['params'], h


@pytest.mark.parametrize('shape', [(8, 16, 64), (8, 16, 8, 8)])
def test_a_kernel_that_the_mesh_splits_is_gathered_and_no_position_is(shape):
    mesh = sharding.make_mesh('fsdp=2,context=2,tensor=2')
    where = lambda *spec: jax.NamedSharding(mesh, jax.P(*spec))  # noqa: E731
    most = {}
    for reads in ('mlp', None):
        step, params, h = added(reads, shape)
        want = jax.jit(step)(params, h)
        kernel = where('tensor', *[None] * (len(shape) - 3), 'fsdp')
        args = (
            jax.tree.map(lambda w, at=kernel: jax.device_put(w, at), params),
            jax.device_put(h, where('fsdp', 'context', 'tensor')),
        )
        with jax.set_mesh(mesh):
            compiled = jax.jit(step, out_shardings=(None, (kernel, args[1].sharding)))
            text = compiled.lower(*args).compile().as_text()
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
                compiled(*args),
                want,
            )
        most[reads] = max(size for _, size in collectives(text))
    # A device's float32 part of what is added, 4 rows of 8 positions before they are spread.
    assert most['mlp'] == 4 * 8 * 32 * 4 < most[None]


@pytest.mark.parametrize('mesh', ['fsdp=4,data=2', 'fsdp=4,tensor=2'])
@pytest.mark.parametrize('shape', [(8, 16, 64), (8, 16, 8, 8)])
def test_the_gradient_of_outputs_in_parts_of_128_is_the_plain_one(shape, mesh):
    step, params, h = added('mlp', shape, width=512)
    plain, *_ = added(None, shape, width=512)
    want = jax.jit(plain)(params, h)
    with jax.set_mesh(sharding.make_mesh(mesh)):
        assert str(jax.make_jaxpr(step)(params, h)) != str(jax.make_jaxpr(plain)(params, h))
        got = jax.jit(step)(params, h)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


@pytest.mark.parametrize('reads', ['mlp', None])
def test_a_policy_that_keeps_products_keeps_it(reads):
    step, params, h = added(reads, (8, 16, 64), keeps='dots')
    with jax.set_mesh(sharding.make_mesh('fsdp=2,context=2,tensor=2')):
        # Forward, and the gradients of input and kernel.
        assert str(jax.make_jaxpr(step)(params, h)).count('dot_general[') == 3


def test_where_nothing_is_spread_the_product_is_the_plain_one():
    step, params, h = added('mlp', (8, 1, 64))  # One position, as when tokens are decoded.
    plain, *_ = added(None, (8, 1, 64))
    with jax.set_mesh(sharding.make_mesh('fsdp=2,context=2,tensor=2')):
        assert str(jax.make_jaxpr(step)(params, h)) == str(jax.make_jaxpr(plain)(params, h))
