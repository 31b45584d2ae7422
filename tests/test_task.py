"""Tasks: what counts, what does not, and what a model keeps beside its parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bigjax.tasks.causal_lm import causal_lm
from bigjax.tasks.classification import classification
from bigjax.tasks.regression import regression

V = 4


class Table(nn.Module):
    """Logits of the next token that depend on this one alone: a bigram model."""

    @nn.compact
    def __call__(self, tokens_BT, *, train):
        table_VV = self.param('table', nn.initializers.normal(1.0), (V, V))
        return table_VV[tokens_BT]


class Normed(nn.Module):
    """BatchNorm, dropout and a dense layer."""

    classes: int = 3
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x_BF, *, train):
        x_BF = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x_BF)
        x_BF = nn.Dropout(self.dropout)(x_BF, deterministic=not train)
        return nn.Dense(self.classes)(x_BF)


def language(token_bytes_V=(1, 1, 1, 1), **options):
    return causal_lm(
        Table(), length=5, token_bytes_V=np.array(token_bytes_V), forward_flops=10, decoder=None,
        **options,
    )  # fmt: skip


def classes(dropout=0.0, **options):
    return classification(
        Normed(dropout=dropout), inputs='features', example=jax.ShapeDtypeStruct((2,), jnp.float32),
        class_names=('a', 'b', 'c'), forward_flops=10, unit='rows', **options,
    )  # fmt: skip


def start(task):
    variables = dict(task.init(jax.random.key(0)))
    return variables.pop('params'), variables


def mean(metric):
    return metric[0] / metric[1]


ROWS = {
    'features': np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32),
    'label': np.array([0, 1, 2, 0, 1, 2], np.int32),
}


# ---- Language models ----


def test_padding_neither_counts_nor_carries_gradient(key):
    task = language()
    params, extra = start(task)
    full = {'tokens': jnp.array([[0, 1, 2, 3, 0, 1], [2, 2, 1, 0, 3, 3]])}
    # The second row ends after two tokens: what was there may not matter.
    padded = {'tokens': full['tokens'].at[1, 2:].set(-1)}
    loss = lambda p, batch: task.loss(p, extra, batch, key, True)  # noqa: E731
    (value, (_, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(params, padded)
    log_VV = jax.nn.log_softmax(params['table'])
    pairs = [(0, 1), (1, 2), (2, 3), (3, 0), (0, 1), (2, 2)]
    np.testing.assert_allclose(value, -np.mean([log_VV[a, b] for a, b in pairs]), rtol=1e-6)
    assert metrics['loss'][1] == len(pairs)
    # Alone, the two pieces give the same gradient: nothing flows from the padding.
    pieces = ([[0, 1, 2, 3, 0, 1]], 5), ([[2, 2]], 1)
    alone = [
        (jax.grad(loss, has_aux=True)(params, {'tokens': jnp.array(t)})[0]['table'], n)
        for t, n in pieces
    ]
    np.testing.assert_allclose(grads['table'], sum(g * n for g, n in alone) / 6, atol=1e-6)


def test_a_batch_of_padding_alone_is_no_nan(key):
    task = language()
    params, extra = start(task)
    batch = {'tokens': jnp.full((2, 6), -1)}
    loss = lambda p: task.loss(p, extra, batch, key, True)[0]  # noqa: E731
    value, grads = jax.value_and_grad(loss)(params)
    assert value == 0
    assert not grads['table'].any()


def test_bits_per_byte_of_a_known_distribution(key):
    # p(next) = 1/2, 1/4, 1/8, 1/8 whatever came before: 1, 2, 3 and 3 bits.
    task = language(token_bytes_V=(1, 2, 4, 3))
    params = {'table': jnp.log(jnp.array([[0.5, 0.25, 0.125, 0.125]] * V))}
    batch = {'tokens': jnp.array([[3, 0, 1, 2, 3, 0], [0, 3, 3, -1, -1, -1]])}
    _, (_, metrics) = task.loss(params, {}, batch, key, False)
    bits, size = (1 + 2 + 3 + 3 + 1) + (3 + 3), (1 + 2 + 4 + 3 + 1) + (3 + 3)
    np.testing.assert_allclose(metrics['bits_per_byte'][0], bits, rtol=1e-6)
    assert metrics['bits_per_byte'][1] == size
    np.testing.assert_allclose(mean(metrics['loss']), bits * np.log(2) / 7, rtol=1e-6)


def test_z_loss_is_of_training_only(key):
    with_z, without = language(z_loss=0.1), language()
    params, extra = start(without)
    batch = {'tokens': jnp.array([[0, 1, 2, 3, 0, 1]])}
    value = {
        (task, train): task.loss(params, extra, batch, key, train)[0]
        for task in (with_z, without)
        for train in (True, False)
    }
    assert value[with_z, True] > value[without, True]
    assert value[with_z, False] == value[without, False]


# ---- Classification and regression ----


def test_rows_without_weight_do_not_count(key):
    task = classes()
    params, extra = start(task)
    # Every label once, so that one of the three would be right and two wrong.
    padding = {'features': np.full((3, 2), 1e3, np.float32), 'label': np.arange(3, dtype=np.int32)}
    padded = {name: np.concatenate([ROWS[name], padding[name]]) for name in ROWS}
    padded['weight'] = np.array([1] * 6 + [0] * 3, np.float32)
    evaluate = lambda batch: task.loss(params, extra, batch, key, False)  # noqa: E731
    plain, weighted = evaluate(ROWS), evaluate(padded)
    np.testing.assert_allclose(weighted[0], plain[0], rtol=1e-6)
    for name, (value, weight) in plain[1][1].items():
        np.testing.assert_allclose(weighted[1][1][name][0], value, rtol=1e-6, err_msg=name)
        assert weighted[1][1][name][1] == weight
    assert plain[1][1]['loss'][1] == 6
    assert plain[1][1]['confusion'][0].sum() == 6


def test_batch_statistics_move_in_training_and_rest_in_evaluation(key):
    task = classes()
    params, extra = start(task)
    _, (trained, _) = task.loss(params, extra, ROWS, key, True)
    _, (evaluated, _) = task.loss(params, extra, ROWS, key, False)
    mean_F = trained['batch_stats']['BatchNorm_0']['mean']
    np.testing.assert_allclose(mean_F, 0.5 * ROWS['features'].mean(0), rtol=1e-5)
    for a, b in zip(jax.tree.leaves(evaluated), jax.tree.leaves(extra), strict=True):
        np.testing.assert_array_equal(a, b)
    assert jax.tree.structure(trained) == jax.tree.structure(extra)


def test_dropout_follows_the_key_in_training_only():
    task = classes(dropout=0.5)
    params, extra = start(task)
    value = lambda seed, train: task.loss(  # noqa: E731
        params, extra, ROWS, jax.random.key(seed), train
    )[0]
    assert value(0, True) == value(0, True)
    assert value(0, True) != value(1, True)
    assert value(0, False) == value(1, False)


def test_label_smoothing_is_of_training_only(key):
    smooth, plain = classes(label_smoothing=0.2), classes()
    params, extra = start(plain)
    value = lambda task, train: task.loss(params, extra, ROWS, key, train)[0]  # noqa: E731
    assert value(smooth, True) != value(plain, True)
    assert value(smooth, False) == value(plain, False)


def test_inputs_are_preprocessed_on_the_device(key):
    shifted = classes(preprocess=lambda x: x - 5.0)
    params, extra = start(shifted)
    moved = {**ROWS, 'features': ROWS['features'] + np.float32(5)}
    np.testing.assert_allclose(
        shifted.loss(params, extra, moved, key, False)[0],
        classes().loss(params, extra, ROWS, key, False)[0],
        rtol=1e-5,
    )


def test_regression(key):
    task = regression(Normed(classes=1), features=2, forward_flops=10)
    params, extra = start(task)
    prediction = Normed(classes=1).apply({'params': params, **extra}, ROWS['features'], train=False)
    target = np.arange(6, dtype=np.float32)
    batch = {
        'features': ROWS['features'],
        'target': target,
        'weight': np.array([1, 1, 1, 1, 0, 0], np.float32),
    }
    value, (_, metrics) = task.loss(params, extra, batch, key, False)
    error = np.asarray(prediction)[:4, 0] - target[:4]
    np.testing.assert_allclose(value, np.mean(error**2), rtol=1e-6)
    np.testing.assert_allclose(mean(metrics['absolute_error']), np.abs(error).mean(), rtol=1e-6)


@pytest.mark.parametrize(
    ('task', 'unit', 'units'), [(language(), 'tokens', 5), (classes(), 'rows', 1)]
)
def test_what_a_report_says(task, unit, units):
    assert (task.unit, task.units_per_example) == (unit, units)
    assert task.flops_per_example == 30  # Forward once, backward twice that.
