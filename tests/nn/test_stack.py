"""Stack: scanned equals unrolled, recomputed equals kept, and sharding rules cover both forms."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from bigjax import sharding
from bigjax.nn.linear import Dense
from bigjax.nn.stack import stack, stack_layers, stacked_rules, unstack_layers

DEPTH = 3


class Block(nn.Module):
    """Dense, a product per row, dropout; times the layer's own factor, plus what all share."""

    dropout: float

    @nn.compact
    def __call__(self, x_BC, factor, shift_BC, *, train):
        h_BC = nn.tanh(jnp.sin(Dense(x_BC.shape[-1], name='dense')(x_BC)))
        h_B22 = h_BC.reshape(-1, 2, 2)
        h_BC = nn.tanh(jnp.sin(h_B22 @ h_B22)).reshape(h_BC.shape)
        h_BC = nn.Dropout(self.dropout)(h_BC, deterministic=not train)
        self.sow('sown', 'squares', h_BC * h_BC)
        return x_BC + factor * h_BC + shift_BC, jnp.max(h_BC)


class Model(nn.Module):
    """A stack and nothing else."""

    scan: bool = False
    remat: str = 'none'
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x_BC, *, train=False):
        return stack(
            functools.partial(Block, self.dropout), x_BC, 0.1 * x_BC, depth=DEPTH,
            layers=jnp.array([1.0, 0.5, 2.0]), scan=self.scan, remat=self.remat, train=train,
        )  # fmt: skip


@pytest.fixture(scope='module')
def x_BC():
    return jax.random.normal(jax.random.key(1), (2, 4))


@pytest.fixture(scope='module')
def params(x_BC):
    return Model().init(jax.random.key(0), x_BC)['params']


def value_and_gradient(model, params, x_BC):
    def loss(params, x_BC):
        (y_BC, outputs), sown = model.apply({'params': params}, x_BC, mutable=['sown'])
        size = sum(jnp.sum(x) for x in jax.tree.leaves(sown))
        return jnp.sum(jnp.sin(y_BC)) + jnp.sum(jnp.stack(outputs)) + 0.1 * size

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x_BC)


@pytest.mark.parametrize('remat', ['none', 'full', 'dots', 'dots_no_batch'])
@pytest.mark.parametrize('scan', [False, True])
def test_scan_and_remat_change_no_number(scan, remat, params, x_BC):
    want, (want_params, want_x) = value_and_gradient(Model(), params, x_BC)
    given = stack_layers(params) if scan else params
    value, (d_params, d_x) = value_and_gradient(Model(scan, remat), given, x_BC)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, unstack_layers(d_params) if scan else d_params, want_params)
    close(d_x, want_x)


@pytest.mark.parametrize('scan', [False, True])
def test_remat_keeps_less_for_the_gradient(scan, params):
    given, x_BC = stack_layers(params) if scan else params, jnp.ones((64, 4))

    def kept(remat):
        run = lambda params: Model(scan, remat).apply({'params': params}, x_BC)[0]  # noqa: E731
        _, vjp = jax.vjp(run, given)
        return sum(x.size for x in jax.tree.leaves(vjp))

    assert kept('full') < kept('dots_no_batch') < kept('dots') < kept('none')


def test_names_and_shapes_of_both_forms(params, x_BC):
    assert set(params) == {'block_0', 'block_1', 'block_2'}
    scanned = Model(scan=True).init(jax.random.key(0), x_BC)['params']
    assert set(scanned) == {'blocks'}
    assert jax.tree.map(jnp.shape, scanned) == jax.tree.map(jnp.shape, stack_layers(params))
    kernel_LCC = scanned['blocks']['dense']['kernel']
    assert not np.allclose(kernel_LCC[0], kernel_LCC[1])  # each layer is drawn by itself


def test_every_layer_and_key_has_a_dropout_of_its_own(params, x_BC):
    model = Model(scan=True, dropout=0.5)
    equal = jax.tree.map(lambda x: jnp.stack([x] * DEPTH), params['block_0'])

    def kept(seed):
        variables, rngs = {'params': {'blocks': equal}}, {'dropout': jax.random.key(seed)}
        x_BC = jnp.ones((4, 4))
        sown = model.apply(variables, x_BC, train=True, rngs=rngs, mutable=['sown'])[1]
        return sown['sown']['blocks']['squares'][0] != 0

    masks_NBC = np.concatenate([kept(seed) for seed in (0, 1)])
    assert len(np.unique(masks_NBC, axis=0)) == 2 * DEPTH


def test_layers_are_stacked_and_unstacked_at_every_depth(params):
    tree = {'encoder': params, 'left_block_0': {'a': jnp.ones(2)}, 'head': {'b': jnp.ones(1)}}
    stacked = stack_layers(tree)
    assert set(stacked) == {'encoder', 'left_blocks', 'head'}
    assert stacked['encoder']['blocks']['dense']['bias'].shape == (DEPTH, 4)
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked), tree)


def test_the_tenth_layer_follows_the_ninth():
    tree = {f'block_{i}': {'a': jnp.full(1, i)} for i in range(12)}
    np.testing.assert_array_equal(stack_layers(tree)['blocks']['a'][:, 0], np.arange(12))


def test_rules_cover_stacked_parameters_with_an_axis_before():
    rules = stacked_rules(((r'up/kernel$', ('embed', 'mlp')), (r'(scale|bias)$', ('embed',))))
    mesh = sharding.make_mesh('fsdp=4,tensor=2')
    for path, shape, spec in [
        ('block_1/up/kernel', (8, 8), ('fsdp', 'tensor')),
        ('blocks/up/kernel', (3, 8, 8), ('stage', 'fsdp', 'tensor')),
        ('encoder/blocks/norm/scale', (3, 8), ('stage', 'fsdp')),
        ('blocks/up/bias', (3, 8), ('stage', 'fsdp')),
        ('norm/bias', (8,), ('fsdp',)),
    ]:
        assert sharding.spec_for(path, shape, rules, mesh) == PartitionSpec(*spec)
