"""Layers that read one input: values, gradients, and what a mesh sends for them.

Legend: B batch, T positions, C width, H heads, K key-value heads, D size of a head, M hidden width.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import collectives

from bigjax import sharding
from bigjax.lora import LoRA, lora_task
from bigjax.nn.constrain import constrain, enter, leave
from bigjax.nn.linear import Dense
from bigjax.nn.together import together
from bigjax.task import Task

B, T, C, D, M = 8, 16, 32, 4, 96
ATTENTION = ('heads', {'query': (8, D), 'key': (4, D), 'value': (4, D)})
MLP = ('mlp', {'gate': M, 'up': M})
CASES = pytest.mark.parametrize(
    ('text', 'read'),
    [('data=2,tensor=4', ATTENTION), ('fsdp=4,tensor=2', ATTENTION), ('data=2,tensor=4', MLP)],
    ids=['tensor=4', 'tensor=2', 'mlp'],
)


class Half(nn.Module):
    """Half a block: layers of one input, something of each, and a layer that adds up."""

    split: str
    features: dict
    by_themselves: bool = False
    bias: bool = False
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x_BTC):
        h_BTC = enter(constrain(jnp.sin(x_BTC), 'batch', 'sequence', None))
        dense = functools.partial(Dense, use_bias=self.bias, dtype=self.dtype)
        if self.by_themselves:
            each = [dense(size, name=name)(h_BTC) for name, size in self.features.items()]
        else:
            each = together(dense, h_BTC, self.split, self.features)
        first, *rest = (jnp.tanh((1 + i) * y).reshape(B, T, -1) for i, y in enumerate(each))
        copies = [jnp.repeat(y, first.shape[-1] // y.shape[-1], axis=-1) for y in rest]
        sums = constrain(sum(copies, first), 'batch', 'length', self.split)
        return leave(dense(C, name='out')(sums))


def made(read, **how):
    model = Half(*read, **how)
    x_BTC = jax.random.normal(jax.random.key(1), (B, T, C))
    return model, model.init(jax.random.key(0), x_BTC), x_BTC


def loss(model, variables, x_BTC):
    return jnp.sum(model.apply(variables, x_BTC).astype(jnp.float32) ** 2)


def step(model):
    """The value, and the gradients with respect to the parameters and the input."""
    return jax.value_and_grad(functools.partial(loss, model), (0, 1))


def on_mesh(text, variables, x_BTC):
    """Returns a mesh, and the arrays split over it as models do it."""
    mesh = sharding.make_mesh(text)
    rows = [('fsdp', 'data')[mesh.shape['fsdp'] == 1], 'tensor']

    def place(path, w):
        axes = {'out': ('tensor',)}.get(path[1].key, (None, 'tensor'))
        return jax.device_put(w, jax.NamedSharding(mesh, jax.P(*axes)))

    placed = jax.tree_util.tree_map_with_path(place, variables)
    return mesh, (placed, jax.device_put(x_BTC, jax.NamedSharding(mesh, jax.P(*rows))))


@CASES
def test_values_and_gradients_are_those_of_one_device(text, read):
    model, variables, x_BTC = made(read)
    want = jax.jit(step(Half(*read, by_themselves=True)))(variables, x_BTC)
    mesh, args = on_mesh(text, variables, x_BTC)
    with jax.set_mesh(mesh):
        got = jax.jit(step(model))(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


def sums(model, text, variables, x_BTC):
    """Returns how many arrays of the size of the input are summed over a mesh for its gradient."""
    mesh, args = on_mesh(text, variables, x_BTC)
    with jax.set_mesh(mesh):
        program = jax.jit(lambda *args: step(model)(*args)[1][1]).lower(*args).compile().as_text()
    parts = {'all-reduce': 1, 'reduce-scatter': mesh.shape['tensor']}
    sent = sum(n * size * parts.get(kind, 0) for (kind, size), n in collectives(program).items())
    return sent // (4 * B * T * C * mesh.shape['tensor'] // 8)


@CASES
def test_the_gradient_of_the_input_is_summed_over_the_mesh_once(text, read):
    model, *arrays = made(read)
    apart = Half(*read, by_themselves=True)
    # And one forward.
    assert sums(model, text, *arrays) == 2
    assert sums(apart, text, *arrays) == 1 + len(read[1])


@pytest.mark.parametrize('text', ['', 'data=8', 'fsdp=8'])
def test_where_outputs_are_whole_nothing_changes(text):
    model, *arrays = made(MLP, dtype=jnp.bfloat16, bias=True)
    apart = Half(*MLP, dtype=jnp.bfloat16, bias=True, by_themselves=True)
    with jax.set_mesh(sharding.make_mesh(text, devices=jax.devices()[: 8 if text else 1])):
        assert str(jax.make_jaxpr(step(model))(*arrays)) == str(
            jax.make_jaxpr(step(apart))(*arrays)
        )


def test_adapters_have_their_part_in_the_gradient_of_the_input():
    model, _, x_BTC = made(ATTENTION, bias=True)
    whole = lambda params, extra, x, key, train: loss(model, {'params': params}, x)  # noqa: E731
    task = Task(lambda key: model.init(key, x_BTC), whole, 'rows', 1, 1)
    task = lora_task(task, LoRA(rank=2, adapt='.'))
    params = task.init(jax.random.key(0))['params']
    params = jax.tree.map(lambda w: w + 0.1 * jnp.cos(jnp.arange(w.size)).reshape(w.shape), params)
    grad = jax.grad(lambda params, x_BTC: task.loss(params, {}, x_BTC, None, True), (0, 1))
    want = jax.jit(grad)(params, x_BTC)
    with jax.set_mesh(sharding.make_mesh('fsdp=4,tensor=2')):
        got = jax.jit(grad)(params, x_BTC)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), got, want)
