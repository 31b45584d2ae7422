"""Text classification: labelled texts and a tokenizer become rows of tokens."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bigjax.data.card import Card, MappedArray, load_json, prepared, save_json, saved_card
from bigjax.data.labelled import LabelledSource, open_labelled
from bigjax.data.ragged import Ragged, read_ragged, write_ragged
from bigjax.data.text import check_utf8
from bigjax.data.tokenizers import Tokenizer, make_tokenizer, read_tokenizer, tokenizer_name
from bigjax.experiment import UsageError

if TYPE_CHECKING:
    from bigjax.data.subwords import Template


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """Records of one text each, or two, cut to `seq` tokens or filled with -1.

    Attributes:
        texts: the texts.
        label: int32 [N].
        seq: tokens in a row.
        pairs: the second texts, where there are.
        template: special tokens around them, where the tokenizer has some.
    """

    texts: Ragged
    label: MappedArray | np.ndarray
    seq: int
    pairs: Ragged | None = None
    template: 'Template | None' = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Returns 'tokens' int32 [n, seq], -1 past the end of a text, and 'label' int32 [n]."""
        if self.template is None:
            tokens = self.texts.rows(indices, self.seq)
        else:
            tokens = np.empty((len(indices), self.seq), np.int32)
            for row, index in enumerate(indices.tolist()):
                pair = self.pairs.one(index) if self.pairs else None
                tokens[row] = self.template.join(self.texts.one(index), pair, length=self.seq)
        return {'tokens': tokens, 'label': self.label[indices]}

    def cut(self) -> int:
        """Returns how many records have more tokens than a row has room for."""
        sizes = self.texts.lengths()
        room = self.seq
        if self.template:
            room = self.template.room(self.seq, pair=self.pairs is not None)
        if self.pairs:
            sizes = sizes + self.pairs.lengths()
        return int((sizes > room).sum())


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
    pair_column: str = '',
    test_file: str = '',
) -> LabelledData:
    """Returns labelled texts as rows of tokens, preparing them on first use.

    Args:
        dataset: 'catalogues' (Django's; 'catalogues:PACKAGE' for another), 'csv:FILE', 'tfds:NAME',
            or 'blank:CLASSES', which is read from nowhere.
        seq: tokens in a row; longer texts are cut.
        data_dir: where prepared data is kept.
        tokenizer: as for `tokenizer_name`; what is trained is trained on the training texts, once.
        vocab: number of tokens of those that are trained.
        text_column: CSV column of the text.
        label_column: CSV column of the label.
        pair_column: CSV column (or TFDS feature) of a second text; '' for single texts.
        test_file: CSV file of held-out texts; by default a tenth of the texts, by hash.

    Raises:
        UsageError: no such source, nothing there, or damaged files.
    """
    name = tokenizer_name(tokenizer, vocab)
    if seq < 1:
        raise UsageError(f'--seq={seq}: must be at least 1; try --seq=128')
    if dataset.startswith('blank:'):
        from bigjax.data.blank_texts import blank_classification

        classes, pair = dataset.removeprefix('blank:'), bool(pair_column)
        return blank_classification(classes, seq=seq, tokenizer=tokenizer, vocab=vocab, pair=pair)
    data_dir = os.path.expanduser(data_dir)
    source = open_labelled(
        dataset,
        data_dir=data_dir,
        text_column=text_column,
        label_column=label_column,
        pair_column=pair_column,
        test_file=test_file,
    )
    folder = prepared(
        data_dir,
        f'texts/{source.key}-{name}',
        lambda made: write_rows(made, source, tokenizer, vocab),
    )
    about = load_json(folder / 'about.json')
    read = read_tokenizer(folder, name)
    template = getattr(read, 'template', None)
    if pair_column and not template:
        raise UsageError(
            f'--pair_column={pair_column}: --tokenizer={tokenizer} has no token between two texts; '
            'try --tokenizer=wordpiece'
        )
    if template and seq < 8:
        raise UsageError(f'--seq={seq}: must be at least 8; try --seq=128')
    train, test = (
        TokenRows(
            texts=read_ragged(folder, split),
            label=MappedArray(folder / f'{split}-label.npy'),
            seq=seq,
            pairs=read_ragged(folder, f'{split}-pair') if pair_column else None,
            template=template,
        )
        for split in ('train', 'test')
    )
    notes = []
    if cut := train.cut() + test.cut():
        notes.append(f'{cut} of {len(train) + len(test)} texts are cut to --seq={seq} tokens')
    sizes = {'train': len(train), 'test': len(test)}
    return LabelledData(
        train=train,
        test=test,
        class_names=tuple(about['class_names']),
        tokenizer=read,
        card=saved_card(about['card'], sizes=sizes, notes=notes),
    )


def write_rows(folder: Path, source: LabelledSource, tokenizer: str, vocab: int) -> None:
    """Writes tokens, ends and labels of both splits, and what is known of them, into `folder`."""
    class_names, train, test, card = source.read()
    if len(class_names) < 2:
        raise UsageError(
            f'--dataset={card.name}: all examples have the label {"".join(class_names)!r}; '
            'a classifier needs at least two'
        )
    if tokenizer != 'bytes':
        for part in (train, test):
            for texts in filter(None, (part.texts, part.pairs)):
                for place, text in zip(part.places, texts, strict=True):
                    check_utf8(text, place)
    learnt = lambda: (text.decode() for text in (*train.texts, *(train.pairs or ())))  # noqa: E731
    made = make_tokenizer(folder, tokenizer, vocab=vocab, texts=learnt)
    for split, part in (('train', train), ('test', test)):
        write_ragged(folder, split, made.encode_documents(part.texts))
        np.save(folder / f'{split}-label.npy', np.array(part.labels, np.int32))
        if part.pairs:
            write_ragged(folder, f'{split}-pair', made.encode_documents(part.pairs))
    save_json(folder / 'about.json', {'class_names': class_names, 'card': dataclasses.asdict(card)})
