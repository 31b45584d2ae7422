"""Recurrent encoder and decoder: what they may see, decoding, what attention changes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrix_flops import matrix_flops
from seeing import check_dependence, decoded, widened

from bigjax.models.rnn_seq2seq import RULES, SIZES, RecurrentSeq2Seq, forward_flops
from bigjax.nn.additive import additive_attention
from bigjax.sharding import make_mesh, path_string, spec_for

SHAPE = {'vocab_size': 12, 'embed': 6, 'width': 8}
SOURCE_BS = np.array([[3, 4, 5, -1], [1, 2, -1, -1]], np.int32)
TARGET_BT = np.array([[0, 5, 6], [0, 7, 8]], np.int32)
both = pytest.mark.parametrize('attention', [True, False])


@functools.cache
def variables_of(attention):
    model = RecurrentSeq2Seq(**SHAPE, attention=attention)
    return widened(jax.jit(model.init)(jax.random.key(0), SOURCE_BS, TARGET_BT), jax.random.key(1))


@both
def test_the_past_and_the_source_are_seen_and_nothing_else(attention):
    model = RecurrentSeq2Seq(**SHAPE, attention=attention)
    check_dependence(model, variables_of(attention), SOURCE_BS, TARGET_BT)


@both
def test_decoding_gives_the_same_logits_and_padding_changes_nothing(attention):
    model, variables = RecurrentSeq2Seq(**SHAPE, attention=attention), variables_of(attention)
    logits_BTV = jax.jit(model.apply)(variables, SOURCE_BS, TARGET_BT)
    longer_BS = np.pad(SOURCE_BS, ((0, 0), (0, 3)), constant_values=-1)
    np.testing.assert_allclose(
        decoded(model, variables, longer_BS, TARGET_BT), logits_BTV, atol=1e-5
    )


def test_only_attention_has_weights_for_it():
    with_it, without = (set(variables_of(attention)['params']) for attention in (True, False))
    assert with_it - without == {'query', 'memory', 'score'}
    assert without < with_it


def test_additive_attention_is_the_paper_s():
    """alpha = softmax(v · tanh(q + k)) over what is there, one query at a time."""
    draw = np.random.default_rng(0)
    B, Q, S, A, K = 2, 3, 4, 5, 6
    query, keys, values, score = (
        draw.normal(size=shape).astype(np.float32)
        for shape in ((B, Q, A), (B, S, A), (B, S, K), (A,))
    )
    real = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
    context = additive_attention(query, keys, values, score, real)
    for b in range(B):
        for q in range(Q):
            weight = np.exp(np.tanh(query[b, q] + keys[b, real[b]]) @ score)
            expected = weight / weight.sum() @ values[b, real[b]]
            np.testing.assert_allclose(context[b, q], expected, rtol=1e-5)
    nothing = additive_attention(query, keys, values, score, jnp.zeros((B, S), bool))
    assert np.isfinite(nothing).all()


def test_the_published_size_has_a_place_for_every_parameter():
    mesh = make_mesh('data=2,fsdp=2,tensor=2')
    model = RecurrentSeq2Seq(vocab_size=30000, **SIZES['rnnsearch'])
    made = jax.eval_shape(model.init, jax.random.key(0), SOURCE_BS, TARGET_BT)['params']
    for path, leaf in jax.tree_util.tree_leaves_with_path(made):
        spec = spec_for(path_string(path), leaf.shape, RULES, mesh)
        assert any(spec) or leaf.ndim == 1, path_string(path)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(made))
    E, H, V = 620, 1000, 30000
    gru = lambda inputs, hidden: 3 * hidden * (inputs + hidden) + 4 * hidden  # noqa: E731
    decoder = gru(E, H) + 2 * H * 3 * H
    attention = H * H + 2 * H * H + H
    rest = 2 * H * H + H + (H + 2 * H + E) * E + E + V * E + V
    assert count == 2 * gru(E, H) + decoder + attention + rest


@both
@pytest.mark.parametrize('depth', [1, 2])
def test_flops_are_those_of_the_products(attention, depth):
    shape = {'vocab_size': 32, 'embed': 12, 'width': 16, 'depth': depth, 'attention': attention}
    model = RecurrentSeq2Seq(**shape)
    source_BS, target_BT = np.ones((1, 5), np.int32), np.ones((1, 7), np.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), source_BS, target_BT)
    traced = matrix_flops(model.apply, variables, source_BS, target_BT)
    assert forward_flops(**shape, source_length=5, target_length=7) == traced
