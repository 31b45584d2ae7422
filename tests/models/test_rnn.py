"""The recurrent classifier: padding, pooling, dropout, rules, FLOPs; it learns order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model_variables import check_rules

from bigjax.models.rnn import RULES, RecurrentClassifier, forward_flops

TOKENS = np.array([[1, 2, 3, 4], [5, 1, -1, -1], [-1, -1, -1, -1]], np.int32)


def make(**kwargs):
    sizes = {'classes': 3, 'vocab': 8, 'embed': 5, 'features': 4}
    model = RecurrentClassifier(**(sizes | kwargs))
    return model, jax.jit(model.init)(jax.random.key(0), TOKENS)


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=('train', 'capture_intermediates', 'mutable')
)
def run(model, params, tokens_BT, **kwargs):
    """One compiled call; uncompiled, every operation is compiled by itself."""
    return model.apply(params, tokens_BT, **kwargs)


@pytest.mark.parametrize(
    ('pool', 'direction', 'cell'),
    [
        ('last', 'forward', 'lstm'),
        ('mean', 'forward', 'lstm'),
        ('last', 'both', 'gru'),
        ('mean', 'both', 'elman'),
        ('max', 'both', 'lstm'),
    ],
)
def test_more_padding_gives_the_same_logits(pool, direction, cell):
    model, params = make(pool=pool, direction=direction, cell=cell)
    logits = run(model, params, TOKENS)
    assert logits.shape == (3, 3)
    assert logits.dtype == jnp.float32
    wider = np.pad(TOKENS, ((0, 0), (0, 5)), constant_values=-1)
    np.testing.assert_allclose(run(model, params, wider), logits, atol=1e-6)
    np.testing.assert_allclose(run(model, params, TOKENS[1:2, :2]), logits[1:2], atol=1e-6)
    # A row without tokens leaves only the dense layer's bias, which starts at zero.
    np.testing.assert_array_equal(logits[2], np.zeros(3))


def test_order_matters_and_every_parameter_learns():
    model, params = make()
    logits = run(model, params, TOKENS)
    assert not np.allclose(logits[0], run(model, params, TOKENS[:, ::-1])[0], atol=1e-4)
    gradient = jax.jit(jax.grad(lambda p: (model.apply(p, TOKENS) ** 2).sum()))(params)
    assert all(jnp.abs(g).sum() > 0 for g in jax.tree.leaves(gradient))
    used = np.asarray(jnp.abs(gradient['params']['embed']['embedding']).sum(1) > 0)
    np.testing.assert_array_equal(np.flatnonzero(used), [1, 2, 3, 4, 5])


@pytest.mark.parametrize('layers', [1, 2])
def test_dropout_acts_in_training_between_layers_and_before_the_classes(layers):
    model, params = make(dropout=0.5, layers=layers)
    stack_only = lambda module, _: module.name == 'recurrent'  # noqa: E731
    drawn = lambda seed, train: run(  # noqa: E731
        model,
        params,
        TOKENS,
        train=train,
        rngs={'dropout': jax.random.key(seed)},
        capture_intermediates=stack_only,
        mutable=('intermediates',),
    )
    for ours, theirs in zip(*(jax.tree.leaves(drawn(seed, False)) for seed in (0, 1)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    (first, kept), (second, others) = drawn(0, True), drawn(1, True)
    assert not np.allclose(first[0], second[0])
    # Alone, a layer has nothing dropped out, neither what it reads nor what it writes.
    outputs = [x['intermediates']['recurrent']['__call__'][0][0] for x in (kept, others)]
    assert np.array_equal(*outputs) == (layers == 1)


def test_every_parameter_matches_a_rule_of_its_rank():
    _, params = make(cell='gru')  # which has the most parameters
    check_rules(params['params'], RULES)


def test_flops_count_every_matrix_product():
    # By hand, two ways, T = 10: layer 0 takes 5 inputs, layer 1 takes 8; 4 gates of 4 features.
    expected = 10 * 2 * (2 * 16 * (5 + 4) + 2 * 16 * (8 + 4)) + 2 * 8 * 3
    assert forward_flops(length=10, classes=3, embed=5, features=4, direction='both') == expected
    one_way = forward_flops(length=10, classes=3, embed=5, features=4, direction='forward')
    assert one_way == 10 * (2 * 16 * (5 + 4) + 2 * 16 * (4 + 4)) + 2 * 4 * 3
    gru = forward_flops(length=1, classes=3, embed=5, features=4, layers=1, cell='gru')
    assert gru == 2 * (2 * 12 * (5 + 4)) + 2 * 8 * 3


def test_unknown_pool_is_an_error():
    with pytest.raises(ValueError, match='--pool=sum: must be last, mean or max; try --pool=last'):
        make(pool='sum')


@pytest.mark.parametrize('cell', ['elman', 'lstm', 'gru'])
def test_learns_which_of_two_tokens_came_first(cell):
    model, params = make(classes=2, features=8, embed=8, cell=cell)
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(3, 8, (64, 10)).astype(np.int32)
    labels_B = rng.integers(0, 2, 64)
    places = np.sort(rng.permuted(np.tile(np.arange(10), (64, 1)), axis=1)[:, :2], axis=1)
    rows = np.arange(64)
    tokens_BT[rows, places[:, 0]], tokens_BT[rows, places[:, 1]] = 1 + labels_B, 2 - labels_B
    optimizer = optax.adam(3e-2)

    @jax.jit
    def step(params, state):
        def loss(params):
            logits = model.apply(params, tokens_BT, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels_B).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        update, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, update), state, value

    state = optimizer.init(params)
    for _ in range(80):
        params, state, value = step(params, state)
    assert value < 0.1
