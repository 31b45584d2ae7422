"""Encoder experiments: every objective from file to score, and weights that tell the size."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import experiment as experiments
from bigjax import identity as identities
from bigjax import train
from bigjax.experiment import UsageError
from bigjax.models import bert
from bigjax.recipes.encoders import encoder_shape

SMALL = {'depth': 1, 'width': 8, 'heads': 2, 'hidden': 8, 'seq': 32, 'vocab': 200}
SHORT = {'steps': 1, 'batch': 8, 'warmup': 0, 'eval_batch': 16}


@pytest.fixture
def files(tmp_path):
    """A file for each objective but pretraining."""
    rows = [f'a text about number {n},{"odd" if n % 2 else "even"}' for n in range(40)]
    (tmp_path / 'a.csv').write_text('\n'.join(['text,label', *rows]))
    lines = [f'met O\nAnna{n} B-person\nin O\nYork B-place\n' for n in range(40)]
    (tmp_path / 'a.txt').write_text('\n'.join(lines))
    qas = [{'question': 'Who?', 'id': 'q', 'answers': [{'text': 'Anna', 'answer_start': 2}]}]
    texts = [{'context': f'I Anna am {n}.', 'qas': qas} for n in range(20)]
    (tmp_path / 'a.json').write_text(json.dumps({'data': [{'paragraphs': texts}]}))
    return {
        'classify': f'csv:{tmp_path}/a.csv',
        'tokens': f'conll:{tmp_path}/a.txt',
        'answers': f'squad:{tmp_path}/a.json',
    }


def load(name, tmp_path, **knobs):
    function = experiments.find(name)
    knobs = {'data_dir': str(tmp_path / 'data'), **SMALL, **SHORT, **knobs}
    return experiments.build(function, knobs), identities.identity(name, function, knobs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('objective', 'monitored', 'others'),
    [
        ('classify', 'accuracy', {'loss', 'confusion'}),
        ('tokens', 'f1', {'loss', 'precision', 'recall', 'f1_person', 'f1_place'}),
        ('answers', 'f1', {'loss', 'accuracy', 'exact_match'}),
    ],
)
def test_every_objective_is_trained_and_scored(objective, monitored, others, files, tmp_path):
    experiment, identity = load('bert', tmp_path, objective=objective, dataset=files[objective])
    assert experiment.run.monitor == f'test/{monitored}'
    outcome = train.train(experiment, identity, tmp_path / 'run')
    assert outcome.step == 1
    scores = outcome.scores['test']
    assert others | {monitored} <= set(scores)
    assert all(np.isfinite(value).all() for value in scores.values())
    assert 0 <= scores[monitored] <= 1


@pytest.mark.parametrize('name', ['bert', 'roberta'])
@pytest.mark.parametrize('objective', ['classify', 'tokens', 'answers'])
def test_every_objective_fits_its_data(name, objective, files, tmp_path):
    experiment, _ = load(name, tmp_path, objective=objective, dataset=files[objective], vocab=280)
    variables = jax.eval_shape(experiment.task.init, jax.random.key(0))
    batch = experiment.data.train.take(np.arange(8))
    loss = lambda params: experiment.task.loss(params, {}, batch, jax.random.key(0), True)  # noqa: E731
    scalar, _ = jax.eval_shape(loss, variables['params'])
    assert scalar.shape == ()
    assert experiment.data.card.name == files[objective]


def test_labels_that_mark_no_entities_have_no_entity_scores(tmp_path):
    lines = [f'the DET\ncat{n} NOUN\n' for n in range(40)]
    (tmp_path / 'a.txt').write_text('\n'.join(lines))
    experiment, _ = load('bert', tmp_path, objective='tokens', dataset=f'conll:{tmp_path}/a.txt')
    assert experiment.score is None
    assert experiment.run.monitor == 'test/accuracy'


def test_weights_tell_the_architecture(tmp_path, monkeypatch):
    config = {
        'hidden_size': 12, 'num_hidden_layers': 3, 'num_attention_heads': 6,
        'intermediate_size': 20, 'vocab_size': 99, 'max_position_embeddings': 66,
        'type_vocab_size': 1, 'layer_norm_eps': 1e-6,
    }  # fmt: skip
    monkeypatch.setattr(
        'bigjax.recipes.encoders.open_weights', lambda path: type('W', (), {'config': config})
    )
    shape = encoder_shape(bert.ROBERTA, 'base', 'somewhere', depth=2, width=0)
    assert shape == {
        'vocab_size': 99, 'positions': 64, 'first_position': 2, 'types': 1, 'epsilon': 1e-6,
        'depth': 2, 'heads': 6, 'width': 12, 'hidden': 20,
    }  # fmt: skip
    own = encoder_shape(bert.ROBERTA, 'base', '')
    assert 'vocab_size' not in own
    assert bert.BERT(vocab_size=9, dtype=jnp.float32, **own).width == 768


@pytest.mark.parametrize(
    ('knobs', 'message'),
    [
        ({'mask_rate': 1.5}, '--mask_rate=1.5: must be above 0 and below 1; try --mask_rate=0.15'),
        ({'longest_answer': 0}, '--longest_answer=0: must be at least 1; try --longest_answer=30'),
        ({'seq': 600}, '--seq=600: the model sees 512 tokens; try --seq=512'),
        (
            {'tokenizer': 'bytes', 'objective': 'classify'},
            '--tokenizer=bytes: has no tokens for begin and end; try --tokenizer=wordpiece',
        ),
        (
            {'dataset': 'stdlib', 'objective': 'classify'},
            '--dataset=stdlib: no such source of labelled text; there are catalogues, docstrings, '
            'csv:FILE and tfds:NAME; try --dataset=catalogues',
        ),
        (
            {'dataset': 'csv:x', 'objective': 'tokens'},
            '--dataset=csv:x: no such source of labelled words; there are stdlib, conll:FILE and '
            'jsonl:FILE; try --dataset=stdlib',
        ),
        (
            {'dataset': 'csv:x', 'objective': 'answers'},
            '--dataset=csv:x: no such source of questions; there are stdlib and squad:FILE.json; '
            'try --dataset=stdlib',
        ),
        (
            {'dataset': 'csv:x', 'objective': 'mlm'},
            '--objective=mlm: does not read --dataset=csv:x; try --objective=classify',
        ),
    ],
)
def test_what_does_not_fit_is_refused(knobs, message, files, tmp_path):
    knobs = {'objective': 'classify', 'dataset': files['classify'], **knobs}
    with pytest.raises(UsageError, match=f'^{re.escape(message)}$'):
        load('bert', tmp_path, **knobs)
