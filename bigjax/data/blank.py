"""Data sets of zeros: for plans, and for measuring speed on machines that hold no data."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from bigjax.data.card import Card
from bigjax.data.images import ImageData
from bigjax.data.pipeline import ArrayRecords
from bigjax.data.text import LanguageData, Windows
from bigjax.data.tokenizers import ByteTokenizer, Tokenizer, token_dtype
from bigjax.experiment import UsageError

NAME = 'blank'
DESCRIPTION = 'Zeros, with which nothing can be learnt.'
RECORDS = 64  # of a split


class BlankTokenizer:
    """As many tokens as a model has, none of which stands for anything."""

    def __init__(self, vocab: int):
        self.name, self.vocab_size = f'{NAME}{vocab}', vocab
        self.token_bytes = np.ones(vocab, np.int32)

    def encode(self, text: str) -> np.ndarray:
        return np.zeros(len(text.encode()), np.int32)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        return '?' * int(np.count_nonzero(np.asarray(tokens) >= 0))

    def encode_documents(self, documents: Iterable[bytes]) -> Iterator[np.ndarray]:
        """Yields zeros for each document."""
        return (np.zeros(len(document), np.int32) for document in documents)

    def save(self, folder: Path) -> None:
        pass


def blank_language(*, seq: int, tokenizer: str, vocab: int) -> LanguageData:
    """Returns windows of zeros; the arguments are those of `bigjax.data.text.open_language`."""
    blank: Tokenizer = ByteTokenizer() if tokenizer == 'bytes' else BlankTokenizer(vocab)
    tokens = np.broadcast_to(token_dtype(vocab)(0), (RECORDS * seq + 1,))
    train, validation = (Windows(tokens, seq) for _ in range(2))
    sizes = {'train': len(tokens), 'validation': len(tokens)}
    card = Card(NAME, DESCRIPTION, sizes=sizes, unit='tokens')
    return LanguageData(train, validation, blank, card)


def blank_images(classes: str, *, side: int, channels: int) -> ImageData:
    """Returns black images of the first of so many classes.

    Raises:
        UsageError: `classes` is not a positive number.
    """
    names = numbered(classes)
    shape = (side or 224, side or 224, channels or 3)
    image = np.broadcast_to(np.uint8(0), (RECORDS, *shape))
    records = ArrayRecords({'image': image, 'label': np.zeros(RECORDS, np.int32)})
    card = Card(NAME, DESCRIPTION, sizes={'train': RECORDS, 'test': RECORDS})
    return ImageData(records, records, names, shape, card)


def numbered(classes: str) -> tuple[str, ...]:
    """Returns names of so many classes.

    Raises:
        UsageError: `classes` is not a positive number.
    """
    if not classes.isdecimal() or int(classes) < 1:
        raise UsageError(
            f'--dataset={NAME}:{classes}: must end in a number of classes; '
            f'try --dataset={NAME}:1000'
        )
    return tuple(f'class {number}' for number in range(int(classes)))
