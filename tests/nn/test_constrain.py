"""Constraints: they change no value, place what they name, and cost the collectives they should.

Legend: B batch, T positions, C width, M hidden width.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import sharding
from bigjax.nn.constrain import constrain, enter, leave

B, T, C, M = 8, 16, 32, 64


def mesh(text='fsdp=2,tensor=4'):
    return jax.set_mesh(sharding.make_mesh(text))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def placed(x, *spec):
    where = jax.NamedSharding(jax.sharding.get_mesh(), jax.P(*spec))
    return jax.device_put(x, where)


def test_it_is_the_identity_where_there_is_no_mesh():
    x_BTC = normal(B, T, C)
    assert constrain(x_BTC, 'batch', 'sequence', None) is x_BTC
    assert enter(x_BTC) is x_BTC
    assert leave(x_BTC) is x_BTC
    with jax.set_mesh(sharding.make_mesh('', devices=jax.devices()[:1])):
        assert constrain(x_BTC, 'batch', 'sequence', None) is x_BTC


@pytest.mark.parametrize(
    ('text', 'names', 'shape', 'part'),
    [
        ('fsdp=2,tensor=4', ('batch', 'sequence', None), (8, 16, 32), (4, 4, 32)),
        ('data=2,context=2,tensor=2', ('batch', 'sequence', None), (8, 16, 32), (4, 4, 32)),
        ('data=2,fsdp=2,expert=2', ('batch', 'length', 'mlp'), (8, 16, 32), (1, 16, 32)),
        ('data=2,tensor=4', ('batch', 'length', 'heads', None), (8, 16, 8, 4), (4, 16, 2, 4)),
        ('stage=2,data=2,tensor=2', ('batch', 'length', 'vocab'), (8, 16, 32), (4, 16, 16)),
        # One row cannot be split, and one position: so few are decoded on any mesh.
        ('fsdp=2,tensor=4', ('batch', 'sequence', None), (1, 1, 32), (1, 1, 32)),
        # Of the axes of a dimension as many as divide it.
        ('data=2,fsdp=4', ('batch', None), (6, 3), (3, 3)),
        ('context=2,tensor=4', (None, 'sequence'), (3, 2), (3, 1)),
    ],
)
def test_dimensions_are_split_as_named(text, names, shape, part):
    with mesh(text):
        x = jax.jit(lambda x: constrain(2 * x, *names))(jnp.ones(shape))
    assert x.sharding.shard_shape(shape) == part


def test_names_that_do_not_fit():
    with mesh(), pytest.raises(ValueError, match="names \\('batch',\\) of an array \\[2, 3\\]"):
        constrain(jnp.ones((2, 3)), 'batch')
    with mesh(), pytest.raises(ValueError, match='must be one of batch, examples, '):
        constrain(jnp.ones((2, 3)), 'batch', 'tokens')


def collectives(step, *args):
    """Returns (kind, elements) of each result of a compiled program's collectives."""
    kinds = 'all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute'
    found = []
    for line in jax.jit(step).lower(*args).compile().as_text().splitlines():
        if match := re.match(rf'.* = (.*?) ({kinds})(-start)?\(', line):
            shapes = re.findall(r'\w+\[([\d,]*)\]', match[1])
            found += [(match[2], np.prod([int(n) for n in s.split(',') if n])) for s in shapes]
    return found


def mlp(weights, x_BTC):
    up_CM, down_MC = weights
    h_BTC = enter(constrain(x_BTC, 'batch', 'sequence', None))
    return leave(jnp.tanh(h_BTC @ up_CM) @ down_MC)


def test_an_mlp_gathers_and_scatters_its_activations_once_each_way():
    weights, x_BTC = (normal(C, M, seed=1) / 8, normal(M, C, seed=2) / 8), normal(B, T, C)

    def step(weights, x_BTC):
        loss = lambda weights, x_BTC: jnp.mean(mlp(weights, x_BTC) ** 2)  # noqa: E731
        return jax.value_and_grad(loss, (0, 1))(weights, x_BTC)

    want = jax.jit(step)(weights, x_BTC)
    with mesh('data=2,tensor=4'):
        args = (
            (placed(weights[0], None, 'tensor'), placed(weights[1], 'tensor', None)),
            placed(x_BTC, 'data', 'tensor', None),
        )
        got = jax.jit(step)(*args)
        found = [c for c in collectives(step, *args) if c[1] > C * M / 4]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)
    # One gather forward and two backward (the input is not kept, or kept: then one), two sums.
    kinds = [kind for kind, _ in found]
    assert set(kinds) <= {'all-gather', 'all-reduce', 'reduce-scatter'}
    assert kinds.count('all-reduce') + kinds.count('reduce-scatter') == 2
    assert 2 <= kinds.count('all-gather') <= 3
    assert {size for _, size in found} <= {B * T * C // 2, B * T * C // 8}
