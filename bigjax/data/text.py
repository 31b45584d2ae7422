"""Language modelling: a corpus and a tokenizer become windows of tokens."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from bigjax.data.card import Card, MappedArray, prepared
from bigjax.data.corpora import SPLITS, Corpus, open_corpus
from bigjax.data.tokenizers import Tokenizer, make_tokenizer, read_tokenizer, tokenizer_name
from bigjax.experiment import UsageError


@dataclasses.dataclass(frozen=True)
class Windows:
    """Records of `seq + 1` consecutive tokens, one every `seq`, so each is a target once.

    Attributes:
        tokens: the whole text, integers [n].
        seq: targets in a window.
    """

    tokens: MappedArray | np.ndarray
    seq: int

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.seq)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Returns 'tokens' int32 [n, seq + 1]; what lies past the end of the text is -1."""
        places = indices[:, None] * self.seq + np.arange(self.seq + 1)[None]
        last = len(self.tokens) - 1
        if not len(places) or places[:, -1].max() <= last:
            return {'tokens': self.tokens[places].astype(np.int32)}
        tokens = self.tokens[np.minimum(places, last)].astype(np.int32)
        return {'tokens': np.where(places <= last, tokens, np.int32(-1))}


@dataclasses.dataclass(frozen=True)
class LanguageData:
    """A corpus ready for language modelling.

    Attributes:
        train: windows of the training text.
        validation: windows of the held-out text.
        tokenizer: how the text became tokens.
        card: description; sizes count tokens.
    """

    train: Windows
    validation: Windows
    tokenizer: Tokenizer
    card: Card


def open_language(
    dataset: str, *, seq: int, data_dir: str, tokenizer: str = 'bytes', vocab: int = 4096
) -> LanguageData:
    """Returns a corpus as windows of tokens, preparing it on first use.

    Args:
        dataset: 'stdlib', 'files:GLOB', 'tfds:NAME', or 'blank' for zeros, read from nowhere.
        seq: tokens predicted in a window.
        data_dir: where prepared data is kept.
        tokenizer: as for `tokenizer_name`; what is trained is trained on the training text, once.
        vocab: number of tokens of those that are trained.

    Raises:
        UsageError: unknown source or tokenizer, nothing there, text too short, not UTF-8 for BPE.
    """
    name = tokenizer_name(tokenizer, vocab)
    if seq < 1:
        raise UsageError(f'--seq={seq}: must be at least 1; try --seq=64')
    if dataset == 'blank':
        from bigjax.data.blank import blank_language

        return blank_language(seq=seq, tokenizer=tokenizer, vocab=vocab)
    data_dir = os.path.expanduser(data_dir)
    corpus = open_corpus(dataset, data_dir=data_dir)
    folder = prepared(
        data_dir,
        f'tokens/{corpus.key}-{name}',
        lambda made: write_tokens(made, corpus, tokenizer, vocab),
    )
    train, validation = (Windows(MappedArray(folder / f'{split}.npy'), seq) for split in SPLITS)
    lack = 'and a language model needs at least 2'
    return LanguageData(
        train=train,
        validation=validation,
        tokenizer=read_tokenizer(folder, name),
        card=corpus_card(corpus, dataset, (train, validation), lack=lack),
    )


class Tokens(Protocol):
    """Records cut from one array of tokens."""

    @property
    def tokens(self) -> MappedArray | np.ndarray:
        """All tokens, integers [n]."""

    def __len__(self) -> int:
        """Returns the number of records."""


def corpus_card(corpus: Corpus, dataset: str, parts: Sequence[Tokens], *, lack: str) -> Card:
    """Returns a corpus's card with the tokens of each split.

    Raises:
        UsageError: a split gives no record; `lack` ends the sentence that says so.
    """
    for split, part in zip(SPLITS, parts, strict=True):
        if not len(part):
            raise UsageError(
                f'--dataset={dataset}: its {split} text has {len(part.tokens)} tokens, {lack}'
            )
    sizes = {split: len(part.tokens) for split, part in zip(SPLITS, parts, strict=True)}
    return dataclasses.replace(corpus.card, sizes=sizes)


def write_tokens(folder: Path, corpus: Corpus, tokenizer: str, vocab: int) -> None:
    """Writes the tokens of each split, and the tokenizer if it has a file, into `folder`."""
    utf8 = tokenizer != 'bytes'
    texts = lambda: (text.decode() for text in documents(corpus, 'train', utf8=utf8))  # noqa: E731
    made = make_tokenizer(folder, tokenizer, vocab=vocab, texts=texts)
    for split in SPLITS:
        tokens = made.encode_documents(documents(corpus, split, utf8=utf8))
        np.save(folder / f'{split}.npy', np.concatenate([*tokens]))


def documents(corpus: Corpus, split: str, *, utf8: bool) -> Iterator[bytes]:
    """Yields the documents of a split; with `utf8`, refuses those that are not."""
    for place, text in corpus.documents(split):
        if utf8:
            check_utf8(text, place)
        yield text


def check_utf8(text: bytes, place: str) -> None:
    """Raises UsageError where a text that a tokenizer of characters is to read is not UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f'--tokenizer=bpe: {place} is not UTF-8 at byte {error.start}; convert it, or try '
            '--tokenizer=bytes'
        ) from error
