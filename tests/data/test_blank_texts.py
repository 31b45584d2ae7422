"""Texts from nowhere: shapes, tokens and classes are those that the data set would have."""

import numpy as np
import pytest

from bigjax.data import pipeline
from bigjax.plan.program.compiled import without_data
from bigjax.run import UsageError

# What reads text, and the knob without which its number of classes would not be known.
READERS = {
    'bert': {},
    'roberta': {},
    'bert-classify': {'objective': 'classify', 'dataset': 'blank:3', 'pair_column': 'second'},
    'bert-tokens': {'objective': 'tokens', 'dataset': 'blank:9'},
    'bert-answers': {'objective': 'answers'},
    'transformer_translation': {'dataset': 'tfds:none'},
    'rnn_translation': {'tokenizer': 'bytes'},
    'lstm_classifier': {'dataset': 'blank:5'},
    'rnn_lm': {},
    'wavenet': {},
}
TOKENS = {'rnn_lm': 97, 'wavenet': 129, 'lstm_classifier': 96}  # of a row, else 64 or 32


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    """Nothing may be prepared, however it is asked for."""
    for name in ('passages', 'parallel', 'classification', 'token_labels', 'questions', 'text'):
        monkeypatch.setattr(f'bigjax.data.{name}.prepared', lambda *_: pytest.fail('was prepared'))


@pytest.mark.parametrize('case', READERS)
def test_a_plan_needs_no_text(case, tmp_path):
    name, knobs = case.partition('-')[0], READERS[case]
    experiment = without_data(name, {**knobs, 'data_dir': str(tmp_path / 'none')})
    augment = experiment.augment
    rows = pipeline.train_batches(experiment.data.train, batch=2, seed=0, augment=augment)[0]
    tokens_BT = rows['source' if 'translation' in name else 'tokens']
    expected = TOKENS.get(name, 32 if 'translation' in name else 64)
    assert tokens_BT.shape == (2, expected)
    assert tokens_BT.dtype == np.int32
    assert not (tmp_path / 'none').exists()


def test_masks_and_vocabulary_are_those_that_are_asked_for(tmp_path):
    values = {'vocab': 1234, 'seq': 128, 'tokenizer': 'masked_bpe', 'data_dir': str(tmp_path)}
    experiment = without_data('bert', values)
    assert experiment.tokenizer.vocab_size == 1234
    rows = pipeline.train_batches(
        experiment.data.train, batch=4, seed=0, augment=experiment.augment
    )[0]
    assert rows['targets'].shape == (4, round(0.15 * 128))
    assert (rows['targets'] >= 0).any(1).all()  # every row has something to predict


@pytest.mark.parametrize(('case', 'classes'), [('bert-classify', 3), ('lstm_classifier', 5)])
def test_classes_are_as_many_as_are_told(case, classes, tmp_path):
    knobs = {**READERS[case], 'data_dir': str(tmp_path)}
    assert len(without_data(case.partition('-')[0], knobs).task.class_names) == classes


def test_what_must_be_told_is_named(tmp_path):
    with pytest.raises(UsageError) as error:
        without_data('bert', {'objective': 'classify', 'dataset': 'csv:none.csv'})
    assert str(error.value) == (
        '--dataset=csv:none.csv: no such file; a plan takes no more from it than the number of '
        'classes, so also: try --dataset=blank:1000'
    )
    with pytest.raises(UsageError, match=r'^--dataset=csv:none\.csv: no such file$'):
        without_data('mlp', {'dataset': 'csv:none.csv'})
