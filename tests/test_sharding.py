"""Rules and shardings: what is split how, and what is refused before anything is compiled."""

import math
import re
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from bigjax import sharding
from bigjax.mesh import mesh_text, parse_mesh
from bigjax.optimizers import Optim, make_optimizer
from bigjax.run import UsageError

AUTO = (AxisType.Auto,) * 6


class State(NamedTuple):
    """Like a train state."""

    step: Any
    params: Any
    opt_state: Any


def mesh(data=1, fsdp=1, tensor=1, **more):
    sizes = {'data': data, 'fsdp': fsdp, 'tensor': tensor, **more}
    devices = jax.devices()[: math.prod(sizes.values())]
    return sharding.make_mesh(mesh_text(sizes), devices=devices)


# ---- One parameter ----


def spec(path, shape, rules, **sizes):
    return sharding.spec_for(path, shape, rules, mesh(**sizes))


def test_the_first_rule_that_matches_wins():
    rules = ((r'up/kernel$', ('embed', 'mlp')), (r'kernel$', ('mlp', 'embed')), ('.*', (None,)))
    assert spec('mlp/up/kernel', (4, 4), rules, fsdp=2) == PartitionSpec('fsdp', 'tensor')
    assert spec('mlp/down/kernel', (4, 4), rules, fsdp=2) == PartitionSpec('tensor', 'fsdp')
    assert spec('norm/scale', (4,), rules, fsdp=2) == PartitionSpec(None)


def test_an_unmatched_parameter_is_named():
    with pytest.raises(UsageError) as error:
        spec('head/bias', (4,), ((r'kernel$', ('embed', None)),))
    assert str(error.value) == (
        'parameter \'head/bias\' matches no sharding rule; add (r"head/bias", …) to the RULES of '
        "its model, or end them with ('.*', 'largest')"
    )


def test_a_rule_of_another_rank_is_named():
    with pytest.raises(UsageError) as error:
        spec('head/kernel', (4, 4, 4), ((r'kernel$', ('embed', None)),))
    assert str(error.value) == (
        "sharding rule 'kernel$' names 2 dimensions, but parameter 'head/kernel' has 3; "
        'give one logical axis or None per dimension'
    )


@pytest.mark.parametrize('axes', [('embd',), 'embed', ('fsdp',)])
def test_an_unknown_logical_axis_is_named(axes):
    # 'embed' is ('embed',) with its comma forgotten.
    with pytest.raises(UsageError) as error:
        spec('scale', (4,), ((r'scale$', axes),))
    assert str(error.value) == (
        f"sharding rule 'scale$' gives {axes!r}; it must be a tuple of embed, heads, mlp, vocab, "
        f"channels, experts, layers and None, or 'largest'"
    )


def test_heads_that_the_mesh_does_not_divide():
    rules = ((r'qkv$', ('embed', 'heads', None)),)
    with pytest.raises(UsageError) as error:
        spec('qkv', (6, 4, 2), rules, tensor=3)
    assert str(error.value) == (
        "--mesh=tensor=3: tensor=3 does not divide the 4 heads of parameter 'qkv'; "
        'try --mesh=data=-1'
    )


def test_the_mesh_that_is_suggested_works():
    rules = ((r'qkv$', ('embed', 'heads', None)),)
    with pytest.raises(UsageError) as error:
        spec('qkv', (8, 6, 2), rules, fsdp=2, tensor=4)
    assert str(error.value) == (
        "--mesh=fsdp=2,tensor=4: tensor=4 does not divide the 6 heads of parameter 'qkv'; "
        'try --mesh=data=-1,fsdp=2,tensor=2'
    )
    good = re.search(r'try --mesh=(\S+)', str(error.value))[1]
    sharding.spec_for('qkv', (8, 6, 2), rules, sharding.make_mesh(good))


def test_the_mesh_that_is_suggested_divides_all_parameters():
    shapes = {'a/q': (10, 6), 'b/q': (8, 4), 'b/up': (12, 8), 'c/experts': (3, 8), 'd': (5, 8)}
    rules = (
        (r'q$', ('embed', 'heads')), (r'up$', ('embed', 'mlp')),
        (r'experts$', ('experts', 'embed')), ('d$', ('layers', None)),
    )  # fmt: skip
    at = lambda text, count: types.SimpleNamespace(shape=parse_mesh(text, count))  # noqa: E731
    with pytest.raises(UsageError) as error:
        sharding.parameter_specs(shapes, rules, at('stage=2,fsdp=8,expert=2,tensor=4', 128))
    assert str(error.value) == (
        '--mesh=stage=2,fsdp=8,expert=2,tensor=4: fsdp=8 does not divide the 10 embed of '
        "parameter 'a/q'; try --mesh=data=-1,fsdp=2,tensor=2"
    )
    specs = sharding.parameter_specs(shapes, rules, at('data=-1,fsdp=2,tensor=2', 128))
    assert specs['a/q'] == PartitionSpec('fsdp', 'tensor')
    assert specs['c/experts'] == PartitionSpec('expert', 'fsdp')


@pytest.mark.parametrize(
    ('shape', 'fsdp', 'expected'),
    [
        ((4, 16), 4, (None, 'fsdp')),
        ((16, 4), 4, ('fsdp', None)),
        ((4, 15), 4, ('fsdp', None)),  # The largest that divides.
        ((8, 8), 4, ('fsdp', None)),  # Of equals, the first.
        ((3, 3, 5, 16), 8, (None, None, None, 'fsdp')),
        ((3, 5), 4, (None, None)),
        ((), 4, ()),
    ],
)
def test_the_default_rule_splits_the_largest_dimension_that_divides(shape, fsdp, expected):
    rules = (('.*', 'largest'),)
    assert spec('a', shape, rules, fsdp=fsdp) == PartitionSpec(*expected)


# ---- A whole state ----

RULES = (
    (r'up/kernel$', ('embed', 'mlp')),
    (r'down/kernel$', ('mlp', 'embed')),
    (r'attention/.*kernel$', ('embed', 'heads', None)),
    (r'bias$', ('mlp',)),
    (r'scale$', ('embed',)),
)
# Square matrices, so that only the path can tell which way they are split.
PARAMS = {
    'norm': {'scale': np.ones(8)},
    'mlp': {
        'norm': {'scale': np.ones(4)},
        'up': {'kernel': np.ones((8, 8)), 'bias': np.ones(8)},
        'down': {'kernel': np.ones((8, 8))},
    },
    'attention': {'q': {'kernel': np.ones((8, 2, 4))}},
}
SUFFIXES = (
    'norm/scale', 'mlp/norm/scale', 'mlp/up/kernel', 'mlp/up/bias', 'mlp/down/kernel',
    'attention/q/kernel',
)  # fmt: skip


@pytest.mark.parametrize(
    ('optim', 'copies'),
    [
        (Optim(optimizer='sgd', momentum=0.9), 1),
        (Optim(optimizer='adamw', weight_decay=0.1, clip=1.0), 2),
        (Optim(optimizer='adamw', ema=0.9), 3),
        (Optim(optimizer='adamw', nonfinite='skip'), 2),
        (Optim(optimizer='lion', l1=0.1), 1),
        (Optim(optimizer='adafactor'), 1),
    ],
)
def test_the_optimizer_state_lies_with_its_parameter(optim, copies):
    optimizer, _ = make_optimizer(optim, steps=1000)
    state = jax.eval_shape(lambda p: State(jnp.int32(0), p, optimizer.init(p)), PARAMS)
    placed = sharding.state_shardings(state, RULES, mesh(fsdp=2, tensor=2))
    own = {sharding.path_string(path): s.spec
           for path, s in jax.tree_util.tree_leaves_with_path(placed.params)}  # fmt: skip
    assert own['mlp/up/kernel'] == PartitionSpec('fsdp', 'tensor')
    assert own['mlp/down/kernel'] == PartitionSpec('tensor', 'fsdp')
    found = dict.fromkeys(SUFFIXES, 0)
    leaves = jax.tree_util.tree_leaves_with_path(placed.opt_state)
    shapes = [leaf.shape for leaf in jax.tree.leaves(state.opt_state)]
    for (path, leaf), shape in zip(leaves, shapes, strict=True):
        name = sharding.path_string(path)
        suffix = max((s for s in SUFFIXES if name.endswith('/' + s)), key=len, default=None)
        if suffix and shape == _at(PARAMS, suffix).shape:
            assert leaf.spec == own[suffix], name
            found[suffix] += 1
        else:
            assert leaf.spec == PartitionSpec(), name
    assert set(found.values()) == {copies}


@pytest.mark.parametrize(
    ('axis', 'what'),
    [
        ('stage', 'scanned layers (--scan)'),
        ('expert', 'experts'),
        ('tensor', 'heads, hidden layers, channels or a vocabulary'),
    ],
)
def test_devices_that_would_all_compute_the_same_are_refused(axis, what):
    state = State(jnp.int32(0), {'kernel': np.ones((8, 8))}, ())
    with pytest.raises(UsageError) as error:
        sharding.state_shardings(state, (('.*', 'largest'),), mesh(data=2, fsdp=2, **{axis: 2}))
    text = mesh_text(parse_mesh(f'data=2,fsdp=2,{axis}=2', 8))
    assert str(error.value) == (
        f'--mesh={text}: {axis}=2 shares out {what}, and this model has none; '
        f'try --mesh=data=-1,fsdp=2'
    )


def test_muon_state_lies_with_its_parameter():
    optimizer, _ = make_optimizer(Optim(optimizer='muon'), steps=1000)
    state = jax.eval_shape(lambda p: State(jnp.int32(0), p, optimizer.init(p)), PARAMS)
    placed = sharding.state_shardings(state, RULES, mesh(fsdp=2, tensor=2))
    specs = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(placed.opt_state):
        specs.setdefault(sharding.path_string(path).partition('mlp/')[2], []).append(leaf.spec)
    assert specs['up/kernel'] == [PartitionSpec('fsdp', 'tensor')]  # Momentum.
    assert specs['up/bias'] == [PartitionSpec('tensor')] * 2  # AdamW's two moments.


def test_the_longest_path_decides():
    # 'mlp/kernel' ends in 'kernel', which is a parameter of the same shape, too.
    params = {'kernel': np.ones((8, 8)), 'mlp': {'kernel': np.ones((8, 8))}}
    rules = ((r'mlp/kernel$', ('embed', 'mlp')), (r'kernel$', ('mlp', 'embed')))
    state = jax.eval_shape(lambda: State(jnp.int32(0), params, {'mu': params}))
    moments = sharding.state_shardings(state, rules, mesh(fsdp=2, tensor=2)).opt_state['mu']
    assert moments['kernel'].spec == PartitionSpec('tensor', 'fsdp')
    assert moments['mlp']['kernel'].spec == PartitionSpec('fsdp', 'tensor')


def _at(tree, path):
    for name in path.split('/'):
        tree = tree[name]
    return tree


def test_a_state_can_be_born_as_placed():
    optimizer, _ = make_optimizer(Optim(ema=0.9), steps=1000)
    init = lambda: State(jnp.int32(0), PARAMS, optimizer.init(PARAMS))  # noqa: E731
    placed = sharding.state_shardings(jax.eval_shape(init), RULES, mesh(2, 2, 2))
    state = jax.jit(init, out_shardings=placed)()
    for leaf, where in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim)


def test_bytes_per_device():
    shapes = {'a': (8, 8), 'b': (8,), 'c': ()}
    state = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    state['b'] = jax.ShapeDtypeStruct((8,), jnp.bfloat16)
    on = mesh(2, 2, 2)
    specs = {'a': PartitionSpec('fsdp', 'tensor'), 'b': PartitionSpec('tensor')}
    where = {n: jax.NamedSharding(on, specs.get(n, PartitionSpec())) for n in shapes}
    assert sharding.bytes_per_device(state, where) == 8 * 8 * 4 // 4 + 8 * 2 // 2 + 4
    # As the device says itself.
    arrays = {n: jax.device_put(np.zeros(x.shape, x.dtype), where[n]) for n, x in state.items()}
    held = sum(array.addressable_shards[0].data.nbytes for array in arrays.values())
    assert sharding.bytes_per_device(state, where) == held


# ---- Batches ----


def test_a_batch_that_divides():
    sharding.check_batch('batch', 16, mesh(2, 2, 2), accumulate=4)
    sharding.check_batch('eval_batch', 4, mesh(2, 2, 2))


@pytest.mark.parametrize(
    ('flag', 'batch', 'accumulate', 'message'),
    [
        ('batch', 30, 1, '--batch=30: must be a positive multiple of 4, the 4 batch shards of the '
                         'mesh; try --batch=32'),
        ('eval_batch', 1, 1, '--eval_batch=1: must be a positive multiple of 4, the 4 batch shards '
                             'of the mesh; try --eval_batch=4'),
        ('batch', 0, 1, '--batch=0: must be a positive multiple of 4, the 4 batch shards of the '
                        'mesh; try --batch=4'),
        ('batch', 28, 3, '--batch=28: must be a positive multiple of 12, the 4 batch shards of the '
                         'mesh times --accumulate=3; try --batch=24'),
    ],
)  # fmt: skip
def test_a_batch_that_does_not_divide(flag, batch, accumulate, message):
    with pytest.raises(UsageError) as error:
        sharding.check_batch(flag, batch, mesh(2, 2, 2), accumulate=accumulate)
    assert str(error.value) == message


def test_rows_lie_in_order_over_data_and_fsdp():
    where = sharding.batch_sharding(mesh(2, 2, 2))
    rows = np.arange(16, dtype=np.float32).reshape(8, 2)
    placed = sharding.shard_batch({'x': rows}, where)['x']
    np.testing.assert_array_equal(placed, rows)
    assert placed.sharding.shard_shape(placed.shape) == (2, 2)
    stacked = sharding.batch_sharding(mesh(2, 2, 2), stacked=True)
    placed = sharding.shard_batch({'x': rows[None]}, stacked)['x']
    assert placed.sharding.shard_shape(placed.shape) == (1, 2, 2)


# ---- Activations ----


@pytest.mark.parametrize(
    ('names', 'shape', 'expected'),
    [
        (('batch', 'sequence', None), (4, 4, 3), (('data', 'fsdp'), ('tensor',), None)),
        (('batch', 'heads'), (6, 3), (('data',), None)),  # As many axes as divide it.
        (('batch', 'length'), (1, 4), (None, None)),  # No context on this mesh.
        ((None, 'stages'), (8, 8), (None, None)),
    ],
)
def test_an_activation_is_split_over_the_axes_that_divide_it(names, shape, expected):
    spec = sharding.activation_spec(names, shape, mesh(2, 2, 2))
    assert spec == PartitionSpec(*expected)
