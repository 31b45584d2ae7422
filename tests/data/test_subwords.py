"""Subword tokenizers: what encoders need to know of them, and pretrained folders."""

import re

import numpy as np
import pytest

from bigjax.data.subwords import SubwordTokenizer, Template, read_folder, train_subwords
from bigjax.data.tokenizers import make_tokenizer, tokenizer_name
from bigjax.experiment import UsageError

TEXTS = ['The cat sat on the mat, naïvely.', 'Unbelievable, unbelievably cats sit by mats.'] * 20
KINDS = ('wordpiece', 'wordpiece_cased', 'masked_bpe')


@pytest.fixture(scope='module')
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tokenizers')
    for kind in KINDS:
        train_subwords(TEXTS, kind=kind, vocab=300, path=folder / f'{kind}.json')
    return {kind: SubwordTokenizer(folder / f'{kind}.json') for kind in KINDS}


def piece(tokenizer, token):
    return tokenizer.model.id_to_token(int(token))


@pytest.mark.parametrize('kind', KINDS)
def test_five_tokens_are_special_and_stand_for_no_text(tokenizers, kind):
    one = tokenizers[kind]
    assert one.special.sum() == 5
    assert one.vocab_size == len(one.special) == len(one.continues) == len(one.token_bytes)
    assert one.special[[one.mask, one.unknown, one.template.begin, one.template.end]].all()
    assert np.array_equal(one.token_bytes == 0, one.special)
    assert not one.continues[one.special].any()
    # What looks like a special token in a text is text.
    assert not one.special[one.encode(f'cat {piece(one, one.mask)} mat')].all()
    ids = one.encode(piece(one, one.template.end))
    assert one.template.end not in ids


@pytest.mark.parametrize('kind', KINDS)
def test_tokens_go_on_with_words(tokenizers, kind):
    one = tokenizers[kind]
    tokens = one.encode('cat unbelievabls, mats')
    words = ''.join(
        ('~' if one.continues[t] else ' ') + piece(one, t).removeprefix('##').strip('Ġ')
        for t in tokens
    )
    assert words.replace('~', '').split() == ['cat', 'unbelievabls', ',', 'mats']
    assert '~' in words


def test_casing_and_losslessness(tokenizers):
    assert tokenizers['wordpiece'].decode(tokenizers['wordpiece'].encode('The Cat')) == 'the cat'
    text = 'Die Katze saß\n  auf 那.'
    bpe = tokenizers['masked_bpe']
    assert bpe.decode(bpe.encode(text)) == text
    assert bpe.token_bytes[bpe.encode(text)].sum() == len(text.encode())


@pytest.mark.parametrize('kind', KINDS)
def test_offsets_say_where_tokens_stand(tokenizers, kind):
    text = 'The naïve cat, unbelievably.'
    tokens, offsets = tokenizers[kind].encode_with_offsets(text)
    assert np.array_equal(tokens, tokenizers[kind].encode(text))
    # A letter of two bytes may be two tokens, both of which stand there.
    covered = {place for start, end in offsets.tolist() for place in range(start, end)}
    assert covered >= {place for place, letter in enumerate(text) if letter != ' '}
    assert (np.diff(offsets[:, 0]) >= 0).all()
    assert text[offsets[0, 0] : offsets[0, 1]] in 'The'


@pytest.mark.parametrize('kind', KINDS)
def test_every_word_has_a_token(tokenizers, kind):
    words = ['cat', '\u200b', 'unbelievable', '.']
    pieces = tokenizers[kind].encode_words(words)
    assert len(pieces) == 4
    assert all(pieces)


@pytest.mark.parametrize('between', [(8,), (8, 8)])
def test_a_row_holds_as_much_of_both_texts_as_it_has_room_for(between):
    template = Template(9, between, 8)
    for a in range(9):
        for b in range(9):
            row = template.join(np.arange(a), 10 + np.arange(b), length=11)
            kept = [int((row[:] < 8).sum() - (row < 0).sum()), int((row >= 10).sum())]
            room = 9 - len(between)
            assert template.room(11, pair=True) == room
            assert sum(kept) == min(a + b, room)
            assert (
                kept == [a, b]
                if a + b <= room
                else abs(kept[0] - kept[1]) <= 1 or (kept[np.argmin([a, b])] == min(a, b))
            )
            real = row[row >= 0].tolist()
            assert real[0] == 9
            assert real[-1] == 8
            assert real[1 + kept[0] : 1 + kept[0] + len(between)] == list(between)
    single = template.join(np.arange(7), length=6)
    assert single.tolist() == [9, 0, 1, 2, 3, 8]
    assert template.join(np.arange(0), length=4).tolist() == [9, 8, -1, -1]


def test_pretrained_folders(tokenizers, tmp_path):
    text = 'The cat sat on unbelievable mats.'
    for kind in ('wordpiece', 'masked_bpe'):
        model, folder = tokenizers[kind].model, tmp_path / kind
        folder.mkdir()
        model.model.save(str(folder))  # vocab.txt, or vocab.json and merges.txt
        made = tmp_path / f'{kind}-made'
        made.mkdir()
        read = make_tokenizer(made, str(folder), vocab=1, texts=lambda: pytest.fail('trained'))
        assert np.array_equal(read.encode(text), tokenizers[kind].encode(text))
        assert read.template == tokenizers[kind].template
        assert read.mask == tokenizers[kind].mask
        assert tokenizer_name(str(folder), 1).startswith('own-')
        tokenizers[kind].save(folder)  # as an exported model's folder has it
        assert read_folder(str(folder)).encode(text).ids == model.encode(text).ids
    assert tokenizer_name(str(tmp_path / 'wordpiece'), 1) != tokenizer_name(
        str(tmp_path / 'masked_bpe'), 1
    )


def test_what_was_added_to_a_byte_level_vocabulary_is_text(tokenizers, tmp_path):
    tokenizers['masked_bpe'].save(tmp_path)
    model = read_folder(str(tmp_path))
    model.add_tokens(['    ', ' ß', 'ß'])
    model.save(str(tmp_path / 'tokenizer.json'))
    one = SubwordTokenizer(tmp_path / 'tokenizer.json')
    text = 'cat    mat'
    assert one.decode(one.encode(text)) == text
    assert one.token_bytes[one.encode(text)].sum() == len(text)
    assert one.token_bytes[one.model.token_to_id(' ß')] == 3
    assert one.token_bytes[one.model.token_to_id('ß')] == 2


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    message = f'--tokenizer={tmp_path}: has neither tokenizer.json, nor vocab.txt, nor vocab.json'
    with pytest.raises(UsageError, match=f'^{re.escape(message)}'):
        read_folder(str(tmp_path))
    (tmp_path / 'tokenizer.json').write_text('{}')
    with pytest.raises(UsageError, match=r'cannot be read \('):
        read_folder(str(tmp_path))


@pytest.mark.parametrize(('kind', 'least'), [('wordpiece', 100), ('masked_bpe', 261)])
def test_a_vocabulary_that_is_too_small_is_refused(kind, least):
    message = f'--vocab=50: --tokenizer={kind} has at least {least} tokens'
    with pytest.raises(UsageError, match=f'^{re.escape(message)}'):
        tokenizer_name(kind, 50)
