"""The encoder-decoder Transformer: what it may see, caches, scanned layers, sizes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrix_flops import matrix_flops
from seeing import check_dependence, decoded, widened

from bigjax.experiment import UsageError
from bigjax.models.transformer import RULES, SIZES, Transformer, forward_flops, sinusoids
from bigjax.nn.stack import stack_layers
from bigjax.sharding import make_mesh, path_string, spec_for

SHAPE = {'vocab_size': 12, 'depth': 2, 'heads': 2, 'width': 8, 'hidden': 12, 'logits_bias': True}
SOURCE_BS = np.array([[3, 4, 5, -1], [1, 2, -1, -1]], np.int32)
TARGET_BT = np.array([[0, 5, 6], [0, 7, 8]], np.int32)


@functools.cache
def variables_of(norm='post'):
    made = jax.jit(Transformer(**SHAPE, norm=norm).init)(jax.random.key(0), SOURCE_BS, TARGET_BT)
    return widened(made, jax.random.key(1))


@functools.cache
def logits_of(norm='post'):
    apply = jax.jit(Transformer(**SHAPE, norm=norm).apply)
    return apply(variables_of(norm), SOURCE_BS, TARGET_BT)


@pytest.mark.parametrize('norm', ['post', 'pre'])
def test_the_past_and_the_source_are_seen_and_nothing_else(norm):
    check_dependence(Transformer(**SHAPE, norm=norm), variables_of(norm), SOURCE_BS, TARGET_BT)


@pytest.mark.parametrize('norm', ['post', 'pre'])
def test_decoding_gives_the_same_logits(norm):
    model = Transformer(**SHAPE, norm=norm)
    logits_BTV = decoded(model, variables_of(norm), SOURCE_BS, TARGET_BT)
    np.testing.assert_allclose(logits_BTV, logits_of(norm), atol=1e-5)


def test_scanned_layers_are_the_same_layers():
    model = Transformer(**SHAPE, scan=True, remat='full')
    stacked = {'params': stack_layers(variables_of()['params'])}
    made = jax.eval_shape(model.init, jax.random.key(0), SOURCE_BS, TARGET_BT)
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, made)
    logits_BTV = jax.jit(model.apply)(stacked, SOURCE_BS, TARGET_BT)
    np.testing.assert_allclose(logits_BTV, logits_of(), atol=1e-5)
    logits_BTV = decoded(model, stacked, SOURCE_BS, TARGET_BT)
    np.testing.assert_allclose(logits_BTV, logits_of(), atol=1e-5)


def test_padding_changes_nothing():
    longer_BS = np.pad(SOURCE_BS, ((0, 0), (0, 3)), constant_values=-1)
    apply = jax.jit(Transformer(**SHAPE).apply)
    logits_BTV = apply(variables_of(), longer_BS, np.pad(TARGET_BT, ((0, 0), (0, 2))))
    np.testing.assert_allclose(logits_BTV[:, :3], logits_of(), atol=1e-5)


def test_positions_are_sines_beside_cosines():
    table_TC = sinusoids(jnp.arange(50), 6)
    for position, pair in ((0, 0), (7, 1), (49, 2)):
        angle = position / 10000 ** (2 * pair / 6)
        np.testing.assert_allclose(table_TC[position, pair], math.sin(angle), atol=1e-5)
        np.testing.assert_allclose(table_TC[position, 3 + pair], math.cos(angle), atol=1e-5)


def abstract_of(size, **knobs):
    shape = {'vocab_size': 37000, **SIZES[size], **knobs}
    variables = jax.eval_shape(Transformer(**shape).init, jax.random.key(0), SOURCE_BS, TARGET_BT)
    return variables['params']


@pytest.mark.parametrize(('size', 'millions'), [('base', 63.1), ('big', 214.2)])
def test_published_sizes(size, millions):
    """Table 3 says 65 and 213 million; its vocabulary is of "about" 37,000 tokens."""
    shape = SIZES[size]
    C, M, depth = shape['width'], shape['hidden'], shape['depth']
    attention, mlp, norm = 4 * (C * C + C), 2 * C * M + M + C, 2 * C
    encoder, decoder = attention + mlp + 2 * norm, 2 * attention + mlp + 3 * norm
    expected = 37000 * C + depth * (encoder + decoder)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_of(size)))
    assert count == expected
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize('scan', [False, True])
def test_every_parameter_has_a_place(scan):
    mesh = make_mesh('data=2,fsdp=2,tensor=2')
    leaves = jax.tree_util.tree_leaves_with_path(abstract_of('base', scan=scan, logits_bias=True))
    for path, leaf in leaves:
        spec = spec_for(path_string(path), leaf.shape, RULES, mesh)
        assert any(spec), path_string(path)
        if path_string(path).endswith('q/kernel'):
            assert spec[int(scan) :] == ('fsdp', 'tensor', None)


def test_flops_are_those_of_the_products():
    shape = {'vocab_size': 64, 'depth': 1, 'width': 32, 'hidden': 64}
    model = Transformer(**shape, heads=2)
    source_BS, target_BT = np.ones((1, 8), np.int32), np.ones((1, 16), np.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), source_BS, target_BT)
    traced = matrix_flops(model.apply, variables, source_BS, target_BT)
    assert forward_flops(**shape, source_length=8, target_length=16) == traced


def test_knobs_that_do_not_fit():
    with pytest.raises(UsageError) as error:
        Transformer(**SHAPE | {'heads': 3})
    assert str(error.value) == '--heads=3: width 8 must be a multiple of heads; try --heads=2'
    with pytest.raises(UsageError) as error:
        Transformer(**SHAPE | {'heads': 3, 'width': 9})
    assert str(error.value) == (
        '--width=9: must be even, half of it being sines and half cosines; try --width=10'
    )
