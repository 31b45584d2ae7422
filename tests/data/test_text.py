import re
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigjax.data.corpora import python_files, stdlib_corpus
from bigjax.data.pipeline import eval_batches
from bigjax.data.text import Windows, open_language
from bigjax.data.tokenizers import BpeTokenizer, ByteTokenizer, byte_letters, train_bpe
from bigjax.experiment import UsageError

POEM = 'Über allen Gipfeln\nIst Ruh,\nIn allen Wipfeln\nSpürest du\nKaum einen Hauch;\n' * 30


@pytest.fixture(scope='module')
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp('bpe') / 'tokenizer.json'
    train_bpe([POEM], vocab=300, path=path)
    return BpeTokenizer(path)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_both_tokenizers_round_trip(bpe, text):
    for tokenizer in (ByteTokenizer(), bpe):
        tokens = tokenizer.encode(text)
        assert tokens.dtype == np.int32
        assert tokenizer.decode(tokens) == text
        assert tokenizer.token_bytes[tokens].sum() == len(text.encode())
        if text:
            assert 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size


def test_bpe_learns_and_padding_is_not_decoded(bpe):
    assert len(bpe.encode(POEM)) < len(POEM.encode()) / 2
    assert bpe.vocab_size == len(bpe.token_bytes) <= 300
    assert bpe.decode([-1, *bpe.encode('Ruh'), -1]) == 'Ruh'
    assert ByteTokenizer().decode([72, -1, 105]) == 'Hi'


def test_byte_letters_are_those_of_the_library():
    import tokenizers

    assert sorted(byte_letters()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 200), st.integers(1, 30))
def test_every_token_but_the_first_is_a_target_once(size, seq):
    windows = Windows(np.arange(size), seq)
    tokens = windows.take(np.arange(len(windows)))['tokens']
    assert tokens.shape == (len(windows), seq + 1)
    targets = tokens[:, 1:]
    np.testing.assert_array_equal(targets[targets >= 0], np.arange(1, size))
    inputs = tokens[:, :-1][targets >= 0]
    np.testing.assert_array_equal(inputs, np.arange(size - 1))


def test_stdlib_is_the_library_that_runs(tmp_path):
    data = open_language('stdlib', seq=64, data_dir=str(tmp_path))
    root = Path(sysconfig.get_path('stdlib'))
    paths = sorted(path for path, _ in python_files(root))
    text = b''.join((root / path).read_bytes() for path in paths)
    tokens = np.concatenate([data.train.tokens[:], data.validation.tokens[:]])
    assert tokens.tobytes() == text
    assert 0.85 < len(data.train.tokens) / len(text) < 0.95
    assert data.card.sizes == {
        'train': len(data.train.tokens),
        'validation': len(data.validation.tokens),
    }
    assert data.card.license == 'Python Software Foundation License Version 2'
    skipped = {'site-packages', 'test', 'tests', 'idle_test', 'lib2to3', '__pycache__'}
    assert not any(skipped & set(path.split('/')[:-1]) for path in paths)
    # The second time nothing is prepared, and the names tell this library from another.
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    open_language('stdlib', seq=64, data_dir=str(tmp_path))
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    assert stdlib_corpus(data_dir='').key in [
        path.name[:-6] for path in (tmp_path / 'tokens').iterdir()
    ]


def test_stdlib_of_the_measured_python():
    import platform

    if platform.python_version() != '3.12.1':
        pytest.skip('the size is known for CPython 3.12.1')
    sizes = [size for _, size in python_files(sysconfig.get_path('stdlib'))]
    # A Windows or Debian build has a few generated files more or less.
    assert abs(len(sizes) - 613) <= 3
    assert abs(sum(sizes) - 11_285_888) < 200_000


def test_files_in_path_order_cut_at_a_boundary(tmp_path):
    for number in range(10):
        (tmp_path / f'{number}.txt').write_bytes(b'%d' % number * 100)
    data = open_language(f'files:{tmp_path}/*.txt', seq=8, data_dir=str(tmp_path / 'data'))
    assert data.train.tokens[:].tobytes() == b''.join(b'%d' % n * 100 for n in range(9))
    assert data.validation.tokens[:].tobytes() == b'9' * 100


def test_a_single_file_is_cut_at_a_line_end(tmp_path):
    (tmp_path / 'poem.txt').write_text(POEM, encoding='utf-8')
    data = open_language(f'files:{tmp_path}/poem.txt', seq=8, data_dir=str(tmp_path / 'data'))
    train, validation = (w.tokens[:].tobytes() for w in (data.train, data.validation))
    assert (train + validation).decode() == POEM
    assert train.endswith(b'\n')
    assert 0.89 < len(train) / len(POEM.encode()) < 0.93


def test_changed_files_are_read_again(tmp_path):
    path = tmp_path / 'poem.txt'
    for text in (POEM, POEM.upper()):
        path.write_text(text, encoding='utf-8')
        data = open_language(f'files:{path}', seq=8, data_dir=str(tmp_path / 'data'))
        assert data.train.tokens[:50].tobytes() == text.encode()[:50]


def test_bpe_corpus(tmp_path):
    (tmp_path / 'poem.txt').write_text(POEM, encoding='utf-8')
    arguments = {'seq': 8, 'data_dir': str(tmp_path / 'data'), 'tokenizer': 'bpe', 'vocab': 300}
    data = open_language(f'files:{tmp_path}/poem.txt', **arguments)
    text = ''.join(data.tokenizer.decode(w.tokens[:]) for w in (data.train, data.validation))
    assert text == POEM
    batches = eval_batches(data.validation, batch=4)
    tokens = np.concatenate([batches[n]['tokens'][:, 1:] for n in range(len(batches))])
    assert (tokens >= 0).sum() == len(data.validation.tokens) - 1


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (
            {'dataset': 'wikipedia'},
            '--dataset=wikipedia: no such source of text; there are stdlib, files:GLOB and '
            'tfds:NAME; try --dataset=stdlib',
        ),
        (
            {'dataset': 'files:{tmp}/none/*'},
            '--dataset=files:{tmp}/none/*: no file matches; try a pattern such as '
            '--dataset="files:texts/**/*.txt"',
        ),
        (
            {'dataset': 'files:{tmp}/empty.txt'},
            '--dataset=files:{tmp}/empty.txt: all 1 files are empty',
        ),
        (
            {'dataset': 'files:{tmp}/one.txt'},
            '--dataset=files:{tmp}/one.txt: its train text has 0 tokens, and a language model '
            'needs at least 2',
        ),
        (
            {'dataset': 'stdlib', 'tokenizer': 'words'},
            '--tokenizer=words: must be bytes, bpe, wordpiece, wordpiece_cased, masked_bpe or the '
            'folder of a pretrained model; try --tokenizer=bytes',
        ),
        (
            {'dataset': 'stdlib', 'tokenizer': 'bpe', 'vocab': 100},
            '--vocab=100: --tokenizer=bpe has at least 256 tokens, letters or bytes and special '
            'ones; try --vocab=4096',
        ),
        ({'dataset': 'stdlib', 'seq': 0}, '--seq=0: must be at least 1; try --seq=64'),
        (
            {'dataset': 'files:{tmp}/latin.txt', 'tokenizer': 'bpe'},
            '--tokenizer=bpe: {tmp}/latin.txt is not UTF-8 at byte 3; convert it, or try '
            '--tokenizer=bytes',
        ),
        (
            {'dataset': 'stdlib', 'data_dir': '{tmp}/empty.txt'},
            '--data_dir={tmp}/empty.txt: cannot be written (Not a directory); name a folder '
            'where prepared data may be kept',
        ),
    ],
)
def test_errors(tmp_path, arguments, message):
    (tmp_path / 'empty.txt').write_bytes(b'')
    (tmp_path / 'one.txt').write_bytes(b'x')
    (tmp_path / 'latin.txt').write_bytes(
        'für dich\n'.encode('latin-1').replace(b'f', b'xxf', 1) * 9
    )
    arguments = {'seq': 8, 'data_dir': '{tmp}/data', **arguments}
    arguments = {
        name: value.replace('{tmp}', str(tmp_path)) if isinstance(value, str) else value
        for name, value in arguments.items()
    }
    with pytest.raises(UsageError, match=f'^{re.escape(message.replace("{tmp}", str(tmp_path)))}$'):
        open_language(**arguments)
