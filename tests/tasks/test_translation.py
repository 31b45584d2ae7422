"""Translation: the loss by hand, ragged predictions scored as they are searched for one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from seeing import widened

from bigjax.evaluate import Evaluator
from bigjax.experiment import Run, UsageError
from bigjax.models import rnn_seq2seq
from bigjax.optimizers import Optim
from bigjax.predict import Predictor
from bigjax.recipes.text_to_text import TextPairs, text_to_text
from bigjax.run import Search
from bigjax.scores import ngrams
from bigjax.state import first_state, setup
from bigjax.tasks.translation import make_search, translation

V, BEGIN, END, LENGTH = 12, 10, 11, 5
MODEL = rnn_seq2seq.RecurrentSeq2Seq(vocab_size=V, embed=6, width=8, dropout=0.5)
SOURCE = np.array([[3, 4, END, -1, -1], [1, END, -1, -1, -1], [0, 0, 0, 0, 0]], np.int32)
TARGET = np.array([[5, 6, 7, END, -1], [8, END, -1, -1, -1], [0, 0, 0, 0, 0]], np.int32)


def task(**options):
    options = {'search': Search(beam=2), **options}
    return translation(MODEL, length=LENGTH, begin=BEGIN, end=END, forward_flops=10,
                       token_bytes_V=np.arange(V), **options)  # fmt: skip


@functools.cache
def params():
    made = jax.jit(task().init)(jax.random.key(0))['params']
    return widened(made, jax.random.key(1), 0.5)


@functools.cache
def evaluated():
    batch = {'source': SOURCE, 'target': TARGET, 'weight': np.array([1, 1, 0], np.float32)}
    return jax.jit(lambda p: task().loss(p, {}, batch, jax.random.key(0), False))(params())


def test_the_loss_is_the_mean_over_real_tokens():
    value, (extra, metrics) = evaluated()
    assert extra == {}
    before = np.array([[BEGIN, 5, 6, 7, END], [BEGIN, 8, END, 0, 0]])
    logits = jax.jit(MODEL.apply)({'params': params()}, SOURCE[:2], before)
    logp = np.asarray(jax.nn.log_softmax(logits))
    nats = -sum(logp[0, t, TARGET[0, t]] for t in range(4))
    nats -= sum(logp[1, t, TARGET[1, t]] for t in range(2))
    np.testing.assert_allclose(metrics['loss'], (nats, 6), rtol=1e-5)
    np.testing.assert_allclose(value, nats / 6, rtol=1e-5)
    # Token n stands for n bytes here.
    total = TARGET[:2][TARGET[:2] >= 0].sum()
    np.testing.assert_allclose(metrics['bits_per_byte'], (nats / np.log(2), total), rtol=1e-5)


def test_training_smooths_and_drops_and_evaluation_does_neither():
    batch = {'source': SOURCE[:2], 'target': TARGET[:2]}

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def loss(key, train, smoothing):
        made = task(label_smoothing=smoothing)
        return made.loss(params(), {}, batch, key, train)[0]

    plain = evaluated()[0]
    keys = jax.random.split(jax.random.key(0))
    np.testing.assert_allclose(loss(keys[0], False, 0.1), plain, rtol=1e-6)
    assert loss(keys[0], True, 0.1) != loss(keys[1], True, 0.1)


@pytest.mark.parametrize('beam', [1, 3])
def test_a_prediction_does_not_depend_on_the_rows_beside_it(beam):
    search = Search(beam=beam)
    find = jax.jit(make_search(MODEL, length=LENGTH, begin=BEGIN, end=END, search=search))
    both = find(params(), SOURCE, jnp.array([True, True, False]))
    for row in range(2):
        alone = find(params(), np.tile(SOURCE[row], (3, 1)), jnp.ones(3, bool))
        np.testing.assert_array_equal(both.tokens_BT[row], alone.tokens_BT[1])
    texts = [[t for t in row if t >= 0] for row in np.asarray(both.tokens_BT[:2]).tolist()]
    assert all(text[-1] == END and END not in text[:-1] for text in texts)


def experiment_on(path, **knobs):
    pairs = TextPairs(dataset=f'csv:{path}', tokenizer='bytes', seq=10, score=knobs['score'])
    data = pairs.open(str(path.parent / 'data'))
    shape = {'vocab_size': data.vocab_size, 'embed': 8, 'width': 8, 'depth': 1}
    return text_to_text(
        rnn_seq2seq.RecurrentSeq2Seq(**shape),
        data=data,
        pairs=pairs,
        run=Run(steps=2, batch=8, monitor='test/loss'),
        optim=Optim(warmup=0),
        search=Search(beam=2, prompt='text 1'),
        rules=rnn_seq2seq.RULES,
        forward_flops=rnn_seq2seq.forward_flops(**shape, source_length=10, target_length=10),
    ), data  # fmt: skip


@pytest.mark.parametrize('score', ['bleu', 'rouge'])
def test_ragged_data_is_scored_as_one(tmp_path, monkeypatch, score):
    name = {'rouge': 'rouge', 'bleu': 'bleu_and_chrf'}[score]
    rate, rated = getattr(ngrams, name), []

    def note(texts, references, **options):
        rated.append((texts, references))
        return rate(texts, references, **options)

    monkeypatch.setattr(ngrams, name, note)
    path = tmp_path / 'a.csv'
    rows = [f'text {i},a b {i} d and what is too long' for i in range(110)]
    path.write_text('\n'.join(['source,target', *rows]))
    experiment, data = experiment_on(path, score=score)
    assert len(data.test) == 11  # one batch and three rows
    plan = setup(experiment)
    with jax.set_mesh(plan.mesh):
        state = first_state(experiment, plan)
        scores = Evaluator(experiment, plan)(state, score=True)['test']
        shown = Predictor(experiment, plan.mesh).examples(state.params, {}, data.test, 4)
        generated = experiment.generate(state.params, {})
    find = jax.jit(experiment.task.predict)
    tokens = find(state.params, {}, data.test.take(np.arange(11)))['tokens']
    texts = [data.decode(row) for row in np.asarray(tokens)]
    # References are whole, where the rows of tokens are cut.
    references = [data.test.target.text(row) for row in range(11)]
    assert all(text.endswith('too long') for text in references)
    assert rated == [(texts, references)]  # An untrained model's scores alone tell little.
    expected = rate(texts, references)
    assert {name: scores[name] for name in expected} == pytest.approx(expected)
    assert tuple(expected) == experiment.score_names
    assert len(shown) == 4
    assert shown[2] == (
        f'source     {data.test.source.text(2)}\nreference  {references[2]}\nmodel      {texts[2]}'
    )
    assert len(generated) == 1
    assert isinstance(generated[0], str)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: Search(beam=0), '--beam=0: must be at least 1; try --beam=4'),
        (
            lambda: Search(length_penalty=-1.0),
            '--length_penalty=-1.0: must be from 0 to 10; try --length_penalty=0.6',
        ),
        (
            lambda: TextPairs(label_smoothing=1.0),
            '--label_smoothing=1.0: must be at least 0 and below 1; try --label_smoothing=0.1',
        ),
    ],
)
def test_knobs_that_do_not_fit(make, message):
    with pytest.raises(UsageError) as error:
        make()
    assert str(error.value) == message
