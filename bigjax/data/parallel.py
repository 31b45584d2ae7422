"""Parallel text: pairs and one tokenizer for both sides become rows of tokens."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from bigjax.data.card import Card, MappedArray, load_json, prepared, save_json, saved_card
from bigjax.data.pairs import Pair, PairSource, open_pairs
from bigjax.data.ragged import Ragged
from bigjax.data.tokenizers import Tokenizer, make_tokenizer, read_tokenizer, tokenizer_name
from bigjax.experiment import UsageError

SIDES = ('source', 'target')
SPLITS = ('train', 'test')
Side = Literal['source', 'target']


@dataclasses.dataclass(frozen=True)
class Lines:
    """Texts one after the other, and the tokens of each.

    Attributes:
        tokens: of the texts.
        utf8: the texts themselves, bytes.
    """

    tokens: Ragged
    utf8: Ragged

    def lengths(self) -> np.ndarray:
        """Returns the tokens of each text, int64 [N]."""
        return self.tokens.lengths()

    def text(self, row: int) -> str:
        """Returns one text, whole."""
        return self.utf8.one(row).tobytes().decode()

    def rows(self, indices: np.ndarray, *, seq: int, end: int) -> np.ndarray:
        """Returns int32 [n, seq]: tokens, the end, then -1; a longer text is cut and has no end."""
        lengths = self.tokens.ends[indices] - self.tokens.starts(indices)
        behind = np.arange(seq)[None] == lengths[:, None]
        return np.where(behind, np.int32(end), self.tokens.rows(indices, seq))


@dataclasses.dataclass(frozen=True)
class PairRows:
    """Records of a source and a target text.

    Attributes:
        source: source texts.
        target: their targets.
        seq: tokens in a row of either, the end included.
        end: the token behind a text.
    """

    source: Lines
    target: Lines
    seq: int
    end: int

    def __len__(self) -> int:
        return len(self.source.tokens)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Returns 'source' and 'target' int32 [n, seq], and 'row', which record each is."""
        source, target = (
            lines.rows(indices, seq=self.seq, end=self.end) for lines in (self.source, self.target)
        )
        return {'source': source, 'target': target, 'row': indices.astype(np.int32)}


@dataclasses.dataclass(frozen=True)
class ParallelData:
    """Pairs of texts ready for a model that turns one into the other.

    Attributes:
        train: training records.
        test: held-out records.
        tokenizer: how the texts of both sides became tokens.
        begin: the token a target is decoded from; never in the data.
        end: the token behind every text that is not cut.
        vocab_size: tokens with these two.
        card: description; its notes say what was left out or cut.
    """

    train: PairRows
    test: PairRows
    tokenizer: Tokenizer
    begin: int
    end: int
    vocab_size: int
    card: Card

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the rows [n, seq] of texts from outside, as those of the data are.

        Raises:
            UsageError: a text is empty or longer than a row.
        """
        rows = np.full((len(texts), self.train.seq), -1, np.int32)
        for row, text in zip(rows, texts, strict=True):
            tokens = [*self.tokenizer.encode(text), self.end]
            if len(tokens) == 1:
                raise UsageError('--prompt=: must hold at least one character; try --prompt=Save')
            if len(tokens) > len(row):
                raise UsageError(
                    f'--prompt={text}: is {len(tokens)} tokens with the end, and the model reads '
                    f'{len(row)}; try a shorter one'
                )
            row[: len(tokens)] = tokens
        return rows

    def decode(self, tokens: np.ndarray) -> str:
        """Returns the text of tokens, without the end and what is not of the tokenizer."""
        tokens = np.asarray(tokens)
        return self.tokenizer.decode(tokens[tokens < self.tokenizer.vocab_size])


def open_parallel(
    dataset: str,
    *,
    seq: int,
    data_dir: str,
    tokenizer: str = 'bpe',
    vocab: int = 4096,
    source_column: str = 'source',
    target_column: str = 'target',
    test_file: str = '',
) -> ParallelData:
    """Returns pairs of texts as rows of tokens, preparing them on first use.

    Args:
        dataset: 'catalogues:LANG', 'csv:FILE', 'tfds:NAME', or 'blank', which is read from nowhere.
        seq: tokens in a row, the end included; longer texts are cut, and counted in the card.
        data_dir: where prepared data is kept.
        tokenizer: 'bytes', or 'bpe' trained on both sides of the training pairs, once.
        vocab: number of BPE tokens; 'bytes' has 256 whatever this says.
        source_column: CSV column or TFDS feature of the source.
        target_column: CSV column or TFDS feature of the target.
        test_file: CSV file of held-out pairs; by default a tenth of the sources, by hash.

    Raises:
        UsageError: no such source, nothing there, or damaged files.
    """
    if tokenizer not in ('bytes', 'bpe'):
        raise UsageError(f'--tokenizer={tokenizer}: must be bytes or bpe; try --tokenizer=bpe')
    name = tokenizer_name(tokenizer, vocab)
    if seq < 2:
        raise UsageError(f'--seq={seq}: must be at least 2; try --seq=64')
    if dataset == 'blank':
        from bigjax.data.blank_texts import blank_parallel

        return blank_parallel(seq=seq, tokenizer=tokenizer, vocab=vocab)
    data_dir = os.path.expanduser(data_dir)
    source = open_pairs(
        dataset,
        data_dir=data_dir,
        source_column=source_column,
        target_column=target_column,
        test_file=test_file,
    )
    folder = prepared(
        data_dir,
        f'pairs/{source.key}-{name}',
        lambda made: write_pairs(made, source, tokenizer, vocab),
    )
    own = read_tokenizer(folder, name)
    begin, end = own.vocab_size, own.vocab_size + 1
    train, test = (
        PairRows(_lines(folder, f'{split}-source'), _lines(folder, f'{split}-target'), seq, end)
        for split in SPLITS
    )
    cut = {
        side: sum(int((getattr(rows, side).lengths() >= seq).sum()) for rows in (train, test))
        for side in SIDES
    }
    notes = [f'{count} {side}s are cut to {seq} tokens' for side, count in cut.items() if count]
    sizes = {'train': len(train), 'test': len(test)}
    card = saved_card(load_json(folder / 'card.json'), sizes=sizes, notes=notes)
    return ParallelData(train, test, own, begin, end, own.vocab_size + 2, card)


def write_pairs(folder: Path, source: PairSource, tokenizer: str, vocab: int) -> None:
    """Writes the tokenizer, the texts and tokens of both splits, and the card into `folder`."""
    pairs = source.read()
    texts = lambda: (text for pair in pairs.train for text in pair)  # noqa: E731
    made = make_tokenizer(folder, tokenizer, vocab=vocab, texts=texts)
    for split in SPLITS:
        for number, side in enumerate(SIDES):
            _write_side(folder / f'{split}-{side}', getattr(pairs, split), number, made)
    save_json(folder / 'card.json', dataclasses.asdict(pairs.card))


def _write_side(stem: Path, pairs: list[Pair], number: int, tokenizer: Tokenizer) -> None:
    texts = [pair[number].encode() for pair in pairs]
    for kind, rows in (
        ('tokens', list(tokenizer.encode_documents(texts))),
        ('utf8', [np.frombuffer(text, np.uint8) for text in texts]),
    ):
        np.save(f'{stem}-{kind}.npy', np.concatenate(rows))
        np.save(f'{stem}-{kind}-ends.npy', np.cumsum([len(row) for row in rows], dtype=np.int64))


def _lines(folder: Path, stem: str) -> Lines:
    return Lines(
        *(
            Ragged(
                MappedArray(folder / f'{stem}-{kind}.npy'),
                MappedArray(folder / f'{stem}-{kind}-ends.npy'),
            )
            for kind in ('tokens', 'utf8')
        )
    )
