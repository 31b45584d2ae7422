"""Masked tokens, labels of tokens and answers: what counts, what does not, and the best span."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bigjax.tasks.masked_lm import masked_lm
from bigjax.tasks.question_answering import best_span, question_answering
from bigjax.tasks.token_classification import token_classification

V, T = 5, 6


class Table(nn.Module):
    """Logits of each token that depend on it alone; with positions, at those; and of two classes.

    Attributes:
      outputs: logits of each token.
      pair: whether two logits of the row are given, too.
    """

    outputs: int
    pair: bool = False

    @nn.compact
    def __call__(self, tokens_BT, positions_BP=None, *, train):
        table = self.param('table', nn.initializers.normal(1.0), (V, self.outputs))
        logits = table[jnp.maximum(tokens_BT, 0)]
        if positions_BP is None:
            return logits
        chosen = jnp.take_along_axis(logits, positions_BP[..., None], 1)
        return chosen, logits[:, 0, :2] if self.pair else None


TOKENS = np.array([[0, 1, 2, 3, 4, -1], [4, 3, 2, 1, 0, 2]], np.int32)


def run(task, batch, train=False):
    params = task.init(jax.random.key(0))['params']
    scalar, (_, metrics) = task.loss(params, {}, batch, jax.random.key(1), train)
    return params['table'], scalar, {name: (float(s), float(w)) for name, (s, w) in metrics.items()}


def nats(logits, label):
    return float(jax.nn.logsumexp(logits) - logits[label])


@pytest.mark.parametrize('pair', [False, True])
def test_only_real_targets_of_real_rows_count(pair):
    task = masked_lm(Table(V, pair), length=T, predictions=2, forward_flops=7)
    batch = {
        'tokens': TOKENS,
        'positions': np.array([[1, 0], [2, 3]], np.int32),
        'targets': np.array([[4, -1], [3, 3]], np.int32),
        'random': np.array([1, 0], np.int32),
    }
    table, scalar, metrics = run(task, batch)
    expected = [nats(table[1], 4), nats(table[2], 3), nats(table[1], 3)]
    assert metrics['loss'] == (pytest.approx(sum(expected), rel=1e-5), 3)
    total = sum(expected) / 3
    if pair:
        follows = [nats(table[0, :2], 1), nats(table[4, :2], 0)]
        assert metrics['next_loss'] == (pytest.approx(sum(follows), rel=1e-5), 2)
        total += sum(follows) / 2
    assert ('next_accuracy' in metrics) == pair
    assert scalar == pytest.approx(total, rel=1e-5)
    _, _, padded = run(task, {**batch, 'weight': np.array([1, 0], np.float32)})
    assert padded['loss'] == (pytest.approx(expected[0], rel=1e-5), 1)
    if pair:
        assert padded['next_loss'] == (pytest.approx(follows[0], rel=1e-5), 1)
    assert task.flops_per_example == 21
    assert task.units_per_example == T


def test_labels_of_first_tokens_of_real_rows_count_and_are_predicted():
    task = token_classification(Table(3), length=T, forward_flops=1)
    labels = np.array([[-1, 0, -1, 2, -1, -1], [1, -1, -1, -1, -1, -1]], np.int32)
    table, scalar, metrics = run(task, {'tokens': TOKENS, 'labels': labels})
    expected = [nats(table[1], 0), nats(table[3], 2), nats(table[4], 1)]
    assert metrics['loss'] == (pytest.approx(sum(expected), rel=1e-5), 3)
    assert scalar == pytest.approx(sum(expected) / 3, rel=1e-5)
    # Rows that fill an evaluation batch have the label 0, and no weight.
    weight = np.array([1, 0], np.float32)
    _, _, padded = run(task, {'tokens': TOKENS, 'labels': labels * 0, 'weight': weight})
    assert padded['loss'][1] == T
    outputs = task.predict({'table': table}, {}, {'tokens': TOKENS})
    np.testing.assert_array_equal(outputs['labels'], np.argmax(table, -1)[np.maximum(TOKENS, 0)])


def test_answers_count_both_ends_and_never_padding():
    task = question_answering(Table(2), length=T, longest=3, forward_flops=1)
    batch = {
        'tokens': TOKENS,
        'start': np.array([1, 0], np.int32),
        'end': np.array([2, 0], np.int32),
        'text': np.array([[1, 4], [2, 5]], np.int32),
    }
    table, scalar, metrics = run(task, batch)
    first, second = table[TOKENS[0, :5]], table[TOKENS[1]]
    expected = [
        (nats(first[:, 0], 1) + nats(first[:, 1], 2)) / 2,
        (nats(second[:, 0], 0) + nats(second[:, 1], 0)) / 2,
    ]
    assert metrics['loss'] == (pytest.approx(sum(expected), rel=1e-5), 2)
    assert scalar == pytest.approx(sum(expected) / 2, rel=1e-5)
    outputs = task.predict({'table': table}, {}, batch)
    np.testing.assert_allclose(outputs['none'], [table[0].sum(), table[4].sum()], rtol=1e-5)
    assert (outputs['start'] >= batch['text'][:, 0]).all()
    assert (outputs['end'] < batch['text'][:, 1]).all()


@pytest.mark.parametrize('longest', [1, 3, 9])
def test_the_best_span_is_that_of_all_spans(longest):
    logits = jax.random.normal(jax.random.key(longest), (2, 20, 8))
    text = np.array([[2, 7], [0, 8]] * 10, np.int32)
    start, end, score = best_span(*logits, text, longest=longest)
    for row in range(20):
        spans = [
            (float(logits[0, row, s] + logits[1, row, e]), s, e)
            for s, e in itertools.product(range(*text[row]), repeat=2)
            if 0 <= e - s < longest
        ]
        best = max(spans)
        assert (score[row], start[row], end[row]) == (pytest.approx(best[0]), *best[1:])
