"""BERT: published sizes, what padding and types change, the heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrix_flops import matrix_flops

from bigjax import sharding
from bigjax.experiment import UsageError
from bigjax.models import bert
from bigjax.models.bert_heads import (
    MaskedLM,
    Pooler,
    SequenceClassifier,
    TokenClassifier,
    mean_pool,
)
from bigjax.nn.stack import stack_layers

SMALL = {'vocab_size': 11, 'positions': 8, 'depth': 2, 'heads': 2, 'width': 8, 'hidden': 12}
TOKENS = jnp.array([[1, 5, 9, 2, 7, 2, -1, -1], [1, 4, 2, -1, -1, -1, -1, -1]])


def small(**options):
    return bert.BERT(**{**SMALL, 'dropout': 0.0, **options})


@pytest.fixture(scope='module')
def variables():
    drawn = small(separator=2).init(jax.random.key(0), TOKENS)
    # Biases and types away from zero, so that they have a part.
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), drawn)


def parameters(model):
    abstract = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    return abstract['params']


# With the pooler, as the papers and model cards count them.
@pytest.mark.parametrize(
    ('published', 'size', 'count'),
    [
        (bert.BERT_UNCASED, 'tiny', 4_385_920),
        (bert.BERT_UNCASED, 'minilm', 22_713_216),
        (bert.BERT_UNCASED, 'base', 109_482_240),
        (bert.BERT_UNCASED, 'large', 335_141_888),
        (bert.ROBERTA, 'base', 124_645_632),
        (bert.ROBERTA, 'large', 355_359_744),
    ],
)
def test_parameters_are_the_published_ones_and_all_have_a_rule(published, size, count):
    model = bert.BERT(**bert.SIZES[size], **published, scan=True)
    params = parameters(model)
    width = bert.SIZES[size]['width']
    assert sum(x.size for x in jax.tree.leaves(params)) + width * (width + 1) == count
    rules = bert.RULES if published['vocab_size'] % 2 == 0 else bert.ODD_VOCAB_RULES
    mesh = sharding.make_mesh('fsdp=4,tensor=2')
    for head in (MaskedLM(model, True), SequenceClassifier(model, 3), TokenClassifier(model, 2)):
        for path, x in jax.tree_util.tree_leaves_with_path(parameters(head)):
            name = sharding.path_string(path)
            assert len(sharding.spec_for(name, x.shape, rules, mesh)) <= x.ndim


def test_padding_is_seen_by_no_position(variables):
    model = small(separator=2)
    real = TOKENS >= 0

    def output(embedding, row, place):
        given = {'params': {**variables['params'], 'embedding': embedding}}
        # Padding reads row 0 of the embedding, which no real token here does.
        return model.apply(given, TOKENS)[row, place].sum()

    for row in range(2):
        for place in range(int(real[row].sum())):
            grad = jax.grad(output)(variables['params']['embedding'], row, place)
            assert not np.any(grad[0])
            seen = np.unique(TOKENS[row][real[row]])
            assert np.all(np.any(grad[seen] != 0, axis=1))
            assert not np.any(np.delete(grad, seen, axis=0))


def test_padding_changes_no_number(variables):
    model = small(separator=2)
    whole = model.apply(variables, TOKENS)
    np.testing.assert_allclose(model.apply(variables, TOKENS[1:, :3]), whole[1:, :3], atol=1e-6)
    np.testing.assert_allclose(model.apply(variables, TOKENS[:1, :6]), whole[:1, :6], atol=1e-6)


def test_every_position_sees_those_before_and_behind(variables):
    def output(embedding, place):
        given = {'params': {**variables['params'], 'embedding': embedding}}
        return small(separator=2).apply(given, TOKENS)[0, place].sum()

    for place, other in [(0, 7), (4, 5)]:
        assert np.any(jax.grad(output)(variables['params']['embedding'], place)[other])


def test_types_follow_the_first_separator(variables):
    np.testing.assert_array_equal(
        bert.token_types(TOKENS, 2)[:, :6], [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]
    )
    assert not bert.token_types(TOKENS, None).any()
    derived = small(separator=2).apply(variables, TOKENS)
    given = small().apply(variables, TOKENS, bert.token_types(TOKENS, 2))
    np.testing.assert_array_equal(derived, given)
    assert np.abs(derived - small().apply(variables, TOKENS))[0].max() > 1e-3


def test_scanned_and_recomputed_layers_give_the_same(variables):
    scanned = small(separator=2, scan=True, remat='full').apply(stack_layers(variables), TOKENS)
    plain = small(separator=2).apply(variables, TOKENS)
    np.testing.assert_allclose(scanned, plain, atol=1e-6)


def test_the_first_position_has_its_number():
    model = small(first_position=2, types=1)
    variables = model.init(jax.random.key(0), TOKENS)
    assert variables['params']['position'].shape == (10, 8)
    moved = {'params': {**variables['params'], 'position': jnp.roll(
        variables['params']['position'], -2, 0)}}  # fmt: skip
    np.testing.assert_array_equal(
        model.apply(variables, TOKENS), small(types=1, positions=10).apply(moved, TOKENS)
    )


def test_masked_tokens_are_read_where_they_are():
    model = MaskedLM(small(separator=2), next_sentence=True)
    variables = model.init(jax.random.key(0), TOKENS)
    positions = jnp.array([[4, 1], [1, 0]])
    everywhere, follows = model.apply(variables, TOKENS)
    some, again = model.apply(variables, TOKENS, positions)
    assert everywhere.shape == (2, 8, 11)
    np.testing.assert_allclose(
        some, np.take_along_axis(everywhere, positions[..., None], 1), atol=1e-6
    )
    np.testing.assert_allclose(follows, again, atol=1e-6)
    # The embedding is the output layer, too: nothing else has its shape.
    shapes = [x.shape for x in jax.tree.leaves(variables['params'])]
    assert shapes.count((11, 8)) == 1
    assert MaskedLM(small()).init_with_output(jax.random.key(0), TOKENS)[0][1] is None


def test_classes_do_not_depend_on_padding_whatever_is_pooled():
    for pool in ('first', 'mean'):
        model = SequenceClassifier(small(separator=2), 3, pool)
        variables = model.init(jax.random.key(0), TOKENS)
        logits = model.apply(variables, TOKENS)
        np.testing.assert_allclose(model.apply(variables, TOKENS[1:, :3]), logits[1:], atol=1e-6)
        assert ('pooler' in variables['params']) == (pool == 'first')


def test_pools():
    x_BTC = jax.random.normal(jax.random.key(0), (2, 8, 4))
    mean = mean_pool(x_BTC, TOKENS)
    np.testing.assert_allclose(mean[1], x_BTC[1, :3].mean(0), rtol=1e-5)
    assert not mean_pool(x_BTC, jnp.full((2, 8), -1)).any()
    variables = Pooler().init(jax.random.key(0), x_BTC)
    moved = Pooler().apply(variables, x_BTC.at[:, 1:].set(9.0))
    np.testing.assert_array_equal(moved, Pooler().apply(variables, x_BTC))


def test_dropout_is_in_training_alone():
    model = small(dropout=0.5)
    variables = model.init(jax.random.key(0), TOKENS)
    plain = model.apply(variables, TOKENS)
    drawn = [model.apply(variables, TOKENS, train=True, rngs={'dropout': jax.random.key(n)})
             for n in (0, 1)]  # fmt: skip
    assert np.abs(drawn[0] - drawn[1]).max() > 0.1
    np.testing.assert_array_equal(plain, small().apply(variables, TOKENS))


def test_flops_are_those_of_the_matrices():
    sizes = {'length': 5, 'depth': 2, 'width': 8, 'hidden': 12}
    tokens, positions = jnp.ones((1, 5), jnp.int32), jnp.zeros((1, 3), jnp.int32)
    encoder = small(types=1)  # two types are a product, in place of a look-up
    variables = jax.eval_shape(encoder.init, jax.random.key(0), tokens)
    assert bert.forward_flops(**sizes) == matrix_flops(encoder.apply, variables, tokens)
    model = MaskedLM(encoder)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens, positions)
    traced = matrix_flops(model.apply, variables, tokens, positions)
    assert bert.forward_flops(**sizes, vocab_size=11, predictions=3) == traced


def test_what_does_not_fit_is_refused():
    message = r'^--heads=3: width 8 must be a multiple of heads; try --heads=2$'
    with pytest.raises(UsageError, match=message):
        small(heads=3)
    with pytest.raises(ValueError, match='9 positions: the model sees 8'):
        small().init(jax.random.key(0), jnp.zeros((1, 9), jnp.int32))
