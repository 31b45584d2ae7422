"""Texts of one token over and over, for plans of what reads rows of text; see `bigjax.data.blank`.

None has a data set's own classes, so those are told: blank:CLASSES.
"""

import tempfile
from pathlib import Path

import numpy as np

from bigjax.data.blank import DESCRIPTION, NAME, RECORDS, BlankTokenizer, numbered
from bigjax.data.card import Card
from bigjax.data.classification import LabelledData, TokenRows
from bigjax.data.parallel import Lines, PairRows, ParallelData
from bigjax.data.passages import PassageData, Passages, masked_tokenizer
from bigjax.data.questions import QuestionData, Windows
from bigjax.data.ragged import Ragged
from bigjax.data.squad import Asked
from bigjax.data.subwords import BERT_SPECIAL, SubwordTokenizer
from bigjax.data.token_labels import LabelData, LabelRows
from bigjax.data.tokenizers import (
    TRAINED,
    ByteTokenizer,
    Tokenizer,
    make_tokenizer,
    read_tokenizer,
)


def blank_tokenizer(tokenizer: str, vocab: int) -> Tokenizer:
    """Returns as many tokens as a trained tokenizer is asked for; a model's folder is read."""
    if tokenizer == 'bytes':
        return ByteTokenizer()
    if tokenizer == 'bpe':
        return BlankTokenizer(vocab)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if tokenizer not in TRAINED:
            return make_tokenizer(folder, tokenizer, vocab=vocab, texts=list)
        import tokenizers

        words = [*BERT_SPECIAL, *map(str, range(vocab - len(BERT_SPECIAL)))]
        pieces = {word: number for number, word in enumerate(words)}
        model = tokenizers.models.WordPiece(pieces, unk_token='[UNK]')
        tokenizers.Tokenizer(model).save(str(folder / 'tokenizer.json'))
        return read_tokenizer(folder, tokenizer)


def _masked(tokenizer: str, vocab: int) -> SubwordTokenizer:
    return masked_tokenizer(blank_tokenizer(tokenizer, vocab), tokenizer)


def _texts(token: int, seq: int) -> Ragged:
    """As many texts as there are records, each of `seq` tokens."""
    ends = np.arange(1, RECORDS + 1, dtype=np.int64) * seq
    return Ragged(np.broadcast_to(np.int32(token), (RECORDS * seq,)), ends)


def _card() -> Card:
    return Card(NAME, DESCRIPTION, sizes={'train': RECORDS, 'test': RECORDS}, unit='texts')


def blank_passages(*, seq: int, tokenizer: str, vocab: int, pair: bool) -> PassageData:
    """Returns passages; the arguments are those of `bigjax.data.passages.open_passages`."""
    made = _masked(tokenizer, vocab)
    assert made.template is not None
    start = np.zeros(1, np.int64)
    tokens = np.broadcast_to(np.int32(made.vocab_size - 1), (RECORDS * seq,))
    rows = Passages(tokens, sentences=start, documents=start, template=made.template, seq=seq,
                    pair=pair)  # fmt: skip
    return PassageData(rows, rows, made, _card())


def blank_classification(
    classes: str, *, seq: int, tokenizer: str, vocab: int, pair: bool
) -> LabelledData:
    """Returns texts, or pairs of them, of the first of so many classes.

    Raises:
        UsageError: `classes` is not a positive number.
    """
    names = numbered(classes)
    made = blank_tokenizer(tokenizer, vocab)
    texts = _texts(made.vocab_size - 1, seq)
    rows = TokenRows(
        texts,
        np.zeros(RECORDS, np.int32),
        seq,
        texts if pair else None,
        getattr(made, 'template', None),
    )
    return LabelledData(rows, rows, names, made, _card())


def blank_token_labels(classes: str, *, seq: int, tokenizer: str, vocab: int) -> LabelData:
    """Returns texts whose words all have the first of so many labels.

    Raises:
        UsageError: `classes` is not a positive number.
    """
    names = numbered(classes)
    made = _masked(tokenizer, vocab)
    assert made.template is not None
    size = made.template.room(seq, pair=False)
    rows = LabelRows(_texts(made.vocab_size - 1, size), _texts(0, size), made.template, seq)
    return LabelData(rows, rows, names, made, _card())


def blank_questions(
    *, seq: int, tokenizer: str, vocab: int, longest_question: int, overlap: int
) -> QuestionData:
    """Returns questions; the arguments are those of `bigjax.data.questions.open_questions`."""
    made = _masked(tokenizer, vocab)
    assert made.template is not None
    size = made.template.room(seq, pair=True) - longest_question
    places = np.arange(RECORDS, dtype=np.int64)
    windows = Windows(
        questions=_texts(made.vocab_size - 1, longest_question),
        contexts=_texts(made.vocab_size - 1, size),
        offsets=np.zeros((RECORDS * size, 2), np.int32),
        asked=np.stack([places, 0 * places, 0 * places], 1),
        template=made.template,
        seq=seq,
        longest_question=longest_question,
        overlap=overlap,
    )
    return QuestionData(windows, windows, [Asked('0', '0')] * RECORDS, made, _card())


def blank_parallel(*, seq: int, tokenizer: str, vocab: int) -> ParallelData:
    """Returns pairs of texts; the arguments are those of `bigjax.data.parallel.open_parallel`."""
    made = blank_tokenizer(tokenizer, vocab)
    begin, end = made.vocab_size, made.vocab_size + 1
    lines = Lines(_texts(0, seq), Ragged(np.zeros(RECORDS, np.uint8), np.arange(1, RECORDS + 1)))
    rows = PairRows(lines, lines, seq, end)
    return ParallelData(rows, rows, made, begin, end, end + 1, _card())
