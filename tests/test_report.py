"""The summary, the final scores, the curves, and numbers as people read them."""

import json
import math

import numpy as np
import pytest
import sklearn.metrics
from matplotlib import image

from bigjax import report, units


def test_numbers_read_well():
    values = (0, 7, 999, 1000, 0.1234, 12345, 999_999, 1.5e6, 2.5e13, math.nan)
    assert [units.number(v) for v in values] == [
        '0', '7', '999', '1.00 k', '0.123', '12.3 k', '1.00 M', '1.50 M', '25.0 T', 'nan'
    ]  # fmt: skip
    assert [units.size(v) for v in (0, 1000, 1024, 1.5 * 2**30)] == [
        '0 B', '1000 B', '1.00 KiB', '1.50 GiB'
    ]  # fmt: skip
    assert [units.duration(v) for v in (0.4, 12.34, 59.99, 60, 3723, math.inf)] == [
        '0.40 s', '12.3 s', '1:00', '1:00', '1:02:03', '?'
    ]  # fmt: skip


def test_summary_word_for_word():
    text = report.summary_table(
        {
            'experiment': 'gpt',
            'knobs': {'depth': 3, 'peak_lr': 0.001},
            'parameters': 1000,
            'parameters_by_module': {'embed': 100, 'block_0': 290, 'block_1': 290, 'block_2': 290,
                                     'norm': 30},
            'flops_per_step': 1.234e12,
            'examples_per_step': 12,
            'tokens_per_step': None,
            'mesh': {'data': 4, 'tensor': 2},
            'state_bytes_per_device': 3 * 2**20,
            'data': {'name': 'stdlib', 'sizes': {'train': 12345, 'validation': 678}},
            'devices': '8 x cpu',
            'workdir': 'runs/gpt',
        }
    )  # fmt: skip
    assert text == (
        'embed                                    100   10.0%\n'
        'block_0 … block_2 (3 × 290)              870   87.0%\n'
        'norm                                      30    3.0%\n'
        '────────────────────────────────────────────────────\n'
        'parameters                             1,000\n'
        '\n'
        'experiment          gpt\n'
        'knobs               depth=3 peak_lr=0.001\n'
        'FLOPs per step      1.23 T\n'
        'examples per step   12\n'
        'data                stdlib: train 12,345, validation 678\n'
        'devices             8 x cpu\n'
        'mesh                data=4 tensor=2\n'
        'state per device    3.00 MiB\n'
        'written to          runs/gpt'
    )


@pytest.mark.parametrize('classes', [3, 40])
def test_macro_scores_equal_scikit_learn_on_raw_labels(classes):
    rng = np.random.default_rng(classes)
    # The last class occurs nowhere, the one before only as a prediction.
    truth = rng.integers(0, classes - 2, 500) if classes > 3 else rng.integers(0, 2, 500)
    guess = np.where(rng.random(500) < 0.7, truth, rng.integers(0, classes - 1, 500))
    confusion_CC = sklearn.metrics.confusion_matrix(truth, guess, labels=range(classes))
    names = [f'class {i}' for i in range(classes)]
    scores, text = report.classification_report(confusion_CC, names)
    each = sklearn.metrics.precision_recall_fscore_support(
        truth, guess, average='macro', zero_division=0
    )
    found = [scores[f'macro_{name}'] for name in ('precision', 'recall', 'f1')]
    np.testing.assert_allclose(found, each[:3], rtol=1e-12)
    assert scores['accuracy'] == pytest.approx((truth == guess).mean())
    assert scores['confusion'] == confusion_CC.tolist()
    assert scores['classes']['class 0']['examples'] == (truth == 0).sum()
    assert names[-1] not in scores['classes']
    assert f'{each[2]:.4f}' in text
    # Columns are headed by the first letters of the names.
    assert ('confusion matrix' in text) == (classes < 30) == ('  class 0  class 1\n' in text)
    json.dumps(scores)


def test_an_empty_confusion_matrix_is_refused():
    with pytest.raises(ValueError, match='nothing was evaluated'):
        report.classification_report(np.zeros((2, 2)))


def test_language_model_report():
    scores, text = report.language_model_report(math.log(4), tokens=100, data_bytes=400)
    assert scores == pytest.approx({'loss': math.log(4), 'perplexity': 4.0, 'bits_per_byte': 0.5})
    assert text == 'loss 1.3863 nats per token, perplexity 4, 0.5000 bits per byte'
    assert 'bits_per_byte' not in report.language_model_report(1.0)[0]


def test_smoothing_keeps_a_line_and_passes_over_nan():
    line = np.linspace(5.0, 1.0, 50)
    np.testing.assert_allclose(report.smooth(line, 9)[:-4], line[:-4])
    gap = line.copy()
    gap[20] = np.nan
    np.testing.assert_allclose(report.smooth(gap, 9)[20], line[20])
    assert np.std(report.smooth(np.random.default_rng(0).normal(size=500), 50)[25:]) < 0.3


@pytest.mark.parametrize('count', [1, 60])
def test_learning_curves(tmp_path, count):
    assert report.learning_curves(tmp_path) is None
    with (tmp_path / 'metrics.jsonl').open('w') as file:
        for step in range(1, count + 1):
            loss = None if step == 30 else 1e6 if step == 31 else 1 / step
            record = {'step': step, 'loss': loss, 'learning_rate': 1e-3}
            file.write(json.dumps(record) + '\n')
        for name in ('validation', 'test'):
            record = {'step': count, 'set': name, 'loss': 0.5, 'accuracy': 0.9}
            file.write(json.dumps(record) + '\n')
    path = report.learning_curves(tmp_path)
    assert path == tmp_path / 'learning_curves.png'
    pixels = image.imread(path)
    assert pixels.shape[1] == 960
    assert 0.005 < (pixels[..., :3].min(-1) < 0.7).mean() < 0.2
