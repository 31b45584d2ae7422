"""Passages of running text as rows with special tokens, in one piece or as two sentences.

A document is what a corpus gives as one; a sentence is a line with something in it.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bigjax.data.card import Card, MappedArray, prepared
from bigjax.data.corpora import SPLITS, Corpus, open_corpus
from bigjax.data.pipeline import Examples, Uniform
from bigjax.data.subwords import SubwordTokenizer, Template
from bigjax.data.text import corpus_card, documents
from bigjax.data.tokenizers import (
    Tokenizer,
    make_tokenizer,
    read_tokenizer,
    token_dtype,
    tokenizer_name,
)
from bigjax.experiment import UsageError


@dataclasses.dataclass(frozen=True)
class Passages:
    """Records of consecutive tokens of one document, every token in one of them.

    Attributes:
        tokens: all documents, one after the other, integers [n].
        sentences: where sentences begin in `tokens`, int64 [S], ascending.
        documents: where documents begin in `sentences`, int64 [D], ascending.
        template: the special tokens around them.
        seq: tokens in a row.
        pair: whether a passage leaves room for being cut in two.
        bounds: first token of each passage and the one after it, int64 [N, 2].
        owner: the document of each passage, int64 [N].
    """

    tokens: MappedArray | np.ndarray
    sentences: MappedArray | np.ndarray
    documents: MappedArray | np.ndarray
    template: Template
    seq: int
    pair: bool = False
    bounds: np.ndarray = dataclasses.field(init=False, repr=False, compare=False)
    owner: np.ndarray = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        starts = self.sentences[:][self.documents[:]]
        ends = np.append(starts[1:], len(self.tokens))
        room = self.template.room(self.seq, pair=self.pair)
        bounds = [np.arange(start, end, room) for start, end in zip(starts, ends, strict=True)]
        first = np.concatenate([np.zeros(0, np.int64), *bounds])
        counts = [len(found) for found in bounds]
        last = np.minimum(first + room, np.repeat(ends, counts))
        # One token cannot be cut in two.
        kept = last - first > int(self.pair)
        object.__setattr__(self, 'bounds', np.stack([first, last], 1)[kept])
        object.__setattr__(self, 'owner', np.repeat(np.arange(len(counts)), counts)[kept])

    def __len__(self) -> int:
        return len(self.bounds)

    def take(self, indices: np.ndarray) -> Examples:
        """Returns 'tokens' int32 [n, seq]; with `pair`, the 'passage' numbers int64 [n] instead."""
        if self.pair:
            return {'passage': np.asarray(indices, np.int64)}
        rows = [
            self.template.join(self.tokens[start:end], length=self.seq)
            for start, end in self.bounds[indices].tolist()
        ]
        return {'tokens': np.stack(rows)}


class NextSentence:
    """Makes two texts of each passage; half of the time, the second is from elsewhere.

    The passage is cut at a sentence's begin drawn at random (in the middle, if there is none
    inside). What replaces the second part begins with a sentence of another document (of the same
    one, if there is no other), and fills the row as far as that document goes.
    """

    def __init__(self, passages: Passages):
        """Prepares; `passages` have room for pairs."""
        self.passages = passages
        # The first sentence of each document, and the end.
        self.heads = np.append(passages.documents[:], len(passages.sentences))

    def __call__(self, examples: Examples, uniform: Uniform) -> Examples:
        """Returns 'tokens' int32 [B, seq] and 'random' int32 [B], 1 where the second is that.

        Args:
            examples: 'passage' [B], numbers of passages.
            uniform: draws three numbers a row.
        """
        draws_B3, source = uniform(3), self.passages
        rows, random = [], draws_B3[:, 0] < 0.5
        for row, number in enumerate(examples['passage'].tolist()):
            start, end = source.bounds[number].tolist()
            cut = self._cut(start, end, draws_B3[row, 1])
            second = source.tokens[cut:end]
            if random[row]:
                second = self._elsewhere(int(source.owner[number]), draws_B3[row, 2])
                second = second[: source.template.room(source.seq, pair=True) - (cut - start)]
            first = source.tokens[start:cut]
            rows.append(source.template.join(first, second, length=source.seq))
        return {'tokens': np.stack(rows), 'random': random.astype(np.int32)}

    def _cut(self, start: int, end: int, draw: float) -> int:
        sentences = self.passages.sentences[:]
        low, high = np.searchsorted(sentences, (start + 1, end))
        if low == high:
            return (start + end) // 2
        return int(sentences[low + int(draw * (high - low))])

    def _elsewhere(self, owner: int, draw: float) -> np.ndarray:
        source, heads = self.passages, self.heads
        own = slice(heads[owner], heads[owner + 1])
        others = len(source.sentences) - (own.stop - own.start)
        if others:
            chosen = int(draw * others)
            chosen += (own.stop - own.start) * (chosen >= own.start)
        else:
            chosen = int(draw * len(source.sentences))
        after = heads[np.searchsorted(heads, chosen, side='right')]
        end = source.sentences[after] if after < len(source.sentences) else len(source.tokens)
        return source.tokens[source.sentences[chosen] : end]


@dataclasses.dataclass(frozen=True)
class PassageData:
    """A corpus ready for masked language modelling.

    Attributes:
        train: training passages.
        validation: held-out passages.
        tokenizer: how the text became tokens.
        card: description; sizes count tokens.
    """

    train: Passages
    validation: Passages
    tokenizer: SubwordTokenizer
    card: Card


def open_passages(
    dataset: str, *, seq: int, data_dir: str, tokenizer: str, vocab: int, pair: bool
) -> PassageData:
    """Returns a corpus as passages, preparing it on first use.

    Args:
        dataset: 'stdlib', 'files:GLOB', 'tfds:NAME', or 'blank', which is read from nowhere.
        seq: tokens in a row, special ones included.
        data_dir: where prepared data is kept.
        tokenizer: one with special tokens; see `bigjax.data.tokenizers.tokenizer_name`.
        vocab: number of tokens of those that are trained.
        pair: whether passages leave room for being cut in two.

    Raises:
        UsageError: unknown source or tokenizer, nothing there, not UTF-8, rows too short.
    """
    if seq < 8:
        raise UsageError(f'--seq={seq}: must be at least 8; try --seq=128')
    name = tokenizer_name(tokenizer, vocab)
    if dataset == 'blank':
        from bigjax.data.blank_texts import blank_passages

        return blank_passages(seq=seq, tokenizer=tokenizer, vocab=vocab, pair=pair)
    data_dir = os.path.expanduser(data_dir)
    corpus = open_corpus(dataset, data_dir=data_dir)
    folder = prepared(
        data_dir,
        f'passages/{corpus.key}-{name}',
        lambda made: write_passages(made, corpus, tokenizer, vocab),
    )
    read = masked_tokenizer(read_tokenizer(folder, name), tokenizer)
    assert read.template is not None
    train, validation = (
        Passages(
            tokens=MappedArray(folder / f'{split}-tokens.npy'),
            sentences=MappedArray(folder / f'{split}-sentences.npy'),
            documents=MappedArray(folder / f'{split}-documents.npy'),
            template=read.template,
            seq=seq,
            pair=pair,
        )
        for split in SPLITS
    )
    card = corpus_card(corpus, dataset, (train, validation), lack='too few to hide some of them')
    return PassageData(train, validation, read, card)


def masked_tokenizer(read: Tokenizer, tokenizer: str) -> SubwordTokenizer:
    """Returns a tokenizer that was read.

    Raises:
        UsageError: it lacks the special tokens that an encoder needs.
    """
    if not isinstance(read, SubwordTokenizer) or read.template is None or read.mask is None:
        raise UsageError(
            f'--tokenizer={tokenizer}: has no tokens for begin, end and mask; '
            'try --tokenizer=wordpiece'
        )
    return read


def write_passages(folder: Path, corpus: Corpus, tokenizer: str, vocab: int) -> None:
    """Writes tokens, sentences and documents of each split, and the tokenizer, into `folder`."""
    texts = lambda: (text.decode() for text in documents(corpus, 'train', utf8=True))  # noqa: E731
    made = masked_tokenizer(make_tokenizer(folder, tokenizer, vocab=vocab, texts=texts), tokenizer)
    for split in SPLITS:
        tokens, size = [np.zeros(0, token_dtype(made.vocab_size))], 0
        sentences: list[int] = []
        heads: list[int] = []
        for text in documents(corpus, split, utf8=True):
            lines = [row for row in made.encode_documents(document_lines(text)) if len(row)]
            if lines:
                heads.append(len(sentences))
                sentences += (size + np.cumsum([0, *map(len, lines[:-1])])).tolist()
                tokens += lines
                size += sum(map(len, lines))
        np.save(folder / f'{split}-tokens.npy', np.concatenate(tokens))
        np.save(folder / f'{split}-sentences.npy', np.array(sentences, np.int64))
        np.save(folder / f'{split}-documents.npy', np.array(heads, np.int64))


def document_lines(text: bytes) -> Iterator[bytes]:
    """Yields the lines of a document with their ends; empty ones belong to the line before."""
    line = b''
    for part in text.splitlines(keepends=True):
        if part.strip() and line.strip():
            yield line
            line = b''
        line += part
    if line:
        yield line
