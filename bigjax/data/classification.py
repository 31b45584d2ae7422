"""Text classification: labelled texts and a tokenizer become rows of tokens."""

import dataclasses
import os
from pathlib import Path

import numpy as np

from bigjax.data.card import Card, MappedArray, load_json, prepared, save_json
from bigjax.data.labelled import LabelledSource, Texts, open_labelled
from bigjax.data.text import check_utf8
from bigjax.data.tokenizers import Tokenizer, read_tokenizer, tokenizer_name, train_bpe
from bigjax.experiment import UsageError


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """Records of one text each, cut to `seq` tokens or filled with -1.

    Attributes:
        tokens: all texts, one after the other, integers [n].
        ends: where each text ends in `tokens`, int64 [N].
        label: int32 [N].
        seq: tokens in a row.
    """

    tokens: MappedArray | np.ndarray
    ends: MappedArray | np.ndarray
    label: MappedArray | np.ndarray
    seq: int

    def __len__(self) -> int:
        return len(self.ends)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Returns 'tokens' int32 [n, seq], -1 past the end of a text, and 'label' int32 [n]."""
        starts = np.where(indices > 0, self.ends[np.maximum(indices - 1, 0)], 0)
        places = starts[:, None] + np.arange(self.seq)[None]
        inside = places < self.ends[indices][:, None]
        tokens = self.tokens[np.where(inside, places, 0)].astype(np.int32)
        return {'tokens': np.where(inside, tokens, np.int32(-1)), 'label': self.label[indices]}


@dataclasses.dataclass(frozen=True)
class LabelledData:
    """Labelled texts ready for classification.

    Attributes:
        train: training records.
        test: held-out records.
        class_names: the name of each label.
        tokenizer: how the texts became tokens.
        card: description.
    """

    train: TokenRows
    test: TokenRows
    class_names: tuple[str, ...]
    tokenizer: Tokenizer
    card: Card

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def open_classification(
    dataset: str,
    *,
    seq: int,
    data_dir: str,
    tokenizer: str = 'bytes',
    vocab: int = 4096,
    text_column: str = 'text',
    label_column: str = 'label',
    test_file: str = '',
) -> LabelledData:
    """Returns labelled texts as rows of tokens, preparing them on first use.

    Args:
        dataset: 'catalogues' (Django's; 'catalogues:PACKAGE' for another), 'csv:FILE', 'tfds:NAME'.
        seq: tokens in a row; longer texts are cut.
        data_dir: where prepared data is kept.
        tokenizer: 'bytes' or 'bpe' (trained on the training texts, once).
        vocab: number of BPE tokens; 'bytes' has 256 whatever this says.
        text_column: CSV column of the text.
        label_column: CSV column of the label.
        test_file: CSV file of held-out texts; by default a tenth of the texts, by hash.

    Raises:
        UsageError: no such source, nothing there, or damaged files.
    """
    name = tokenizer_name(tokenizer, vocab)
    if seq < 1:
        raise UsageError(f'--seq={seq}: must be at least 1; try --seq=128')
    data_dir = os.path.expanduser(data_dir)
    source = open_labelled(
        dataset,
        data_dir=data_dir,
        text_column=text_column,
        label_column=label_column,
        test_file=test_file,
    )
    folder = prepared(
        data_dir, f'texts/{source.key}-{name}', lambda made: write_rows(made, source, name, vocab)
    )
    about = load_json(folder / 'about.json')
    train, test = (
        TokenRows(
            tokens=MappedArray(folder / f'{split}-tokens.npy'),
            ends=MappedArray(folder / f'{split}-ends.npy'),
            label=MappedArray(folder / f'{split}-label.npy'),
            seq=seq,
        )
        for split in ('train', 'test')
    )
    return LabelledData(
        train=train,
        test=test,
        class_names=tuple(about['class_names']),
        tokenizer=read_tokenizer(folder, name),
        card=dataclasses.replace(
            Card(**about['card']), sizes={'train': len(train), 'test': len(test)}
        ),
    )


def write_rows(folder: Path, source: LabelledSource, name: str, vocab: int) -> None:
    """Writes tokens, ends and labels of both splits, and what is known of them, into `folder`."""
    class_names, train, test, card = source.read()
    if len(class_names) < 2:
        raise UsageError(
            f'--dataset={card.name}: all examples have the label {"".join(class_names)!r}; '
            'a classifier needs at least two'
        )
    if name != 'bytes':
        for part in (train, test):
            for place, text in zip(part.places, part.texts, strict=True):
                check_utf8(text, place)
        texts = (text.decode() for text in train.texts)
        train_bpe(texts, vocab=vocab, path=folder / 'tokenizer.json')
    tokenizer = read_tokenizer(folder, name)
    for split, part in (('train', train), ('test', test)):
        write_split(folder, split, part, tokenizer)
    save_json(folder / 'about.json', {'class_names': class_names, 'card': dataclasses.asdict(card)})


def write_split(folder: Path, split: str, part: Texts, tokenizer: Tokenizer) -> None:
    """Writes one split."""
    rows = list(tokenizer.encode_documents(part.texts))
    # One token more than there is, so that a set of empty texts has something to point at.
    flat = np.concatenate([*rows, np.zeros(1, rows[0].dtype)])
    np.save(folder / f'{split}-tokens.npy', flat)
    np.save(folder / f'{split}-ends.npy', np.cumsum([len(row) for row in rows], dtype=np.int64))
    np.save(folder / f'{split}-label.npy', np.array(part.labels, np.int32))
