"""Tokenizers: bytes and byte-level BPE, both lossless; and the choice of one by `--tokenizer`.

Those with special tokens are in `bigjax.data.subwords`.
"""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from bigjax.experiment import UsageError

if TYPE_CHECKING:
    import tokenizers

# Documents that HF `tokenizers` encodes in one call, on all cores.
DOCUMENTS_AT_ONCE = 64
# Tokenizers trained on the texts at hand, and the fewest tokens they can have.
TRAINED = {'bpe': 256, 'wordpiece': 100, 'wordpiece_cased': 100, 'masked_bpe': 261}


class Tokenizer(Protocol):
    """Text to token numbers and back.

    Attributes:
        name: names the tokenizer and its size in cache paths.
        vocab_size: token numbers lie in [0, vocab_size).
        token_bytes: int32 [vocab_size], bytes of text each token stands for.
    """

    name: str
    vocab_size: int
    token_bytes: np.ndarray

    def encode(self, text: str) -> np.ndarray:
        """Returns the tokens of `text`, int32 [n]."""

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Returns the text of `tokens`; negative ones are skipped, broken UTF-8 replaced."""

    def encode_documents(self, documents: Iterable[bytes]) -> Iterator[np.ndarray]:
        """Yields the tokens of each document (UTF-8), unsigned integers [n]."""

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json into `folder`, which has a model's weights; bytes write nothing."""


class ByteTokenizer:
    """Every byte of the UTF-8 text is a token."""

    name = 'bytes'
    vocab_size = 256
    token_bytes = np.ones(256, np.int32)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        tokens = np.asarray(tokens)
        return tokens[tokens >= 0].astype(np.uint8).tobytes().decode(errors='replace')

    def encode_documents(self, documents: Iterable[bytes]) -> Iterator[np.ndarray]:
        """Yields the tokens of each document, uint8 [n]."""
        return (np.frombuffer(document, np.uint8) for document in documents)

    def save(self, folder: Path) -> None:
        pass


class BpeTokenizer:
    """Byte-level byte pair encoding (Radford et al., 2019), as HF `tokenizers` implements it."""

    def __init__(self, path: Path):
        import tokenizers  # Here, for the byte tokenizer need not wait for it.

        self.model = tokenizers.Tokenizer.from_file(str(path))
        self.vocab_size = self.model.get_vocab_size()
        self.name = f'bpe{self.vocab_size}'
        byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
        letters_of = {token: letters for letters, token in self.model.get_vocab().items()}
        self.pieces = [
            bytes(byte_of[letter] for letter in letters_of[token])
            for token in range(self.vocab_size)
        ]
        self.token_bytes = np.array([len(piece) for piece in self.pieces], np.int32)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.model.encode(text).ids, np.int32)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        pieces = (self.pieces[token] for token in np.asarray(tokens).tolist() if token >= 0)
        return b''.join(pieces).decode(errors='replace')

    def encode_documents(self, documents: Iterable[bytes]) -> Iterator[np.ndarray]:
        """Yields the tokens of each document, uint16 or uint32 [n]."""
        return encoded(self.model, documents, token_dtype(self.vocab_size))

    def save(self, folder: Path) -> None:
        self.model.save(str(folder / 'tokenizer.json'))


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """Returns the smaller of uint16 and uint32 that holds every token."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def encoded(
    model: 'tokenizers.Tokenizer', documents: Iterable[bytes], dtype: type[np.unsignedinteger]
) -> Iterator[np.ndarray]:
    """Yields the tokens of each document, `dtype` [n], without special ones around it."""
    for part in itertools.batched(documents, DOCUMENTS_AT_ONCE):
        texts = [document.decode() for document in part]
        for encoding in model.encode_batch_fast(texts, add_special_tokens=False):
            yield np.array(encoding.ids, dtype)


def byte_letters() -> list[str]:
    """Returns the printable character that stands for each byte in a byte-level vocabulary.

    Printable Latin-1 characters stand for themselves, the other bytes for the characters from
    U+0100 on, in order (GPT-2's table).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def train_bpe(documents: Iterable[str], *, vocab: int, path: Path) -> None:
    """Trains a byte-level BPE of `vocab` tokens on `documents` and writes it to `path`."""
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(documents, trainer)
    model.save(str(path))


def tokenizer_name(tokenizer: str, vocab: int) -> str:
    """Returns what tells a tokenizer from others in cache paths: 'bytes', 'bpe4096', 'own-1a2b…'.

    Args:
        tokenizer: 'bytes'; 'bpe', 'wordpiece', 'wordpiece_cased' or 'masked_bpe', which are trained
            on the training texts, the last three with BERT's or RoBERTa's special tokens; or the
            folder (or the tokenizer.json) of a pretrained model.
        vocab: number of tokens of those that are trained.

    Raises:
        UsageError: no such tokenizer, or a vocabulary that cannot be.
    """
    if tokenizer == 'bytes':
        return tokenizer
    if tokenizer in TRAINED:
        if vocab < TRAINED[tokenizer]:
            raise UsageError(
                f'--vocab={vocab}: --tokenizer={tokenizer} has at least {TRAINED[tokenizer]} '
                'tokens, letters or bytes and special ones; try --vocab=4096'
            )
        return f'{tokenizer}{vocab}'
    if not os.path.exists(os.path.expanduser(tokenizer)):
        raise UsageError(
            f'--tokenizer={tokenizer}: must be bytes, {", ".join(TRAINED)} or the folder of a '
            'pretrained model; try --tokenizer=bytes'
        )
    from bigjax.data import subwords

    model = subwords.read_folder(tokenizer).to_str()
    return f'own-{hashlib.sha256(model.encode()).hexdigest()[:10]}'


def make_tokenizer(
    folder: Path, tokenizer: str, *, vocab: int, texts: Callable[[], Iterable[str]]
) -> Tokenizer:
    """Writes the file of a tokenizer, trained or copied, into `folder` and returns it.

    Args:
        folder: where `read_tokenizer` finds it again.
        tokenizer: as for `tokenizer_name`.
        vocab: number of tokens of those that are trained.
        texts: what it is trained on; not called for those that are not trained.
    """
    path = folder / 'tokenizer.json'
    if tokenizer == 'bpe':
        train_bpe(texts(), vocab=vocab, path=path)
    elif tokenizer != 'bytes':
        from bigjax.data import subwords

        if tokenizer in TRAINED:
            subwords.train_subwords(texts(), kind=tokenizer, vocab=vocab, path=path)
        else:
            subwords.read_folder(tokenizer).save(str(path))
    return read_tokenizer(folder, tokenizer_name(tokenizer, vocab))


def read_tokenizer(folder: Path, name: str) -> Tokenizer:
    """Returns the tokenizer called `name` whose file, if it has one, is in `folder`."""
    if name == 'bytes':
        return ByteTokenizer()
    if name.startswith('bpe'):
        return BpeTokenizer(folder / 'tokenizer.json')
    from bigjax.data import subwords

    return subwords.SubwordTokenizer(folder / 'tokenizer.json')
