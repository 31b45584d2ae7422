"""Tokenizers: bytes, and byte-level BPE trained on the corpus at hand. Both are lossless."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from bigjax.experiment import UsageError

# Documents that HF `tokenizers` encodes in one call, on all cores.
DOCUMENTS_AT_ONCE = 64


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


class BpeTokenizer:
    """Byte-level byte pair encoding (Radford et al., 2019), as HF `tokenizers` implements it."""

    def __init__(self, path: Path):
        import tokenizers  # 30 ms that the byte tokenizer need not pay

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
        dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        for part in itertools.batched(documents, DOCUMENTS_AT_ONCE):
            texts = [document.decode() for document in part]
            for encoding in self.model.encode_batch_fast(texts):
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
    """Returns the name of a kind of tokenizer and its size: 'bytes', 'bpe4096'.

    Raises:
        UsageError: no such tokenizer, or a vocabulary that cannot be.
    """
    if tokenizer == 'bytes':
        return tokenizer
    if tokenizer != 'bpe':
        raise UsageError(f'--tokenizer={tokenizer}: must be bytes or bpe; try --tokenizer=bytes')
    if vocab < 256:
        raise UsageError(
            f'--vocab={vocab}: a byte-level BPE has at least the 256 bytes; try --vocab=4096'
        )
    return f'bpe{vocab}'


def read_tokenizer(folder: Path, name: str) -> ByteTokenizer | BpeTokenizer:
    """Returns the tokenizer called `name` whose file, if it has one, is in `folder`."""
    return ByteTokenizer() if name == 'bytes' else BpeTokenizer(folder / 'tokenizer.json')
