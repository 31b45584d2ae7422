"""Texts whose words have labels (names, say): the label goes to the first token of its word."""

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from bigjax.data.card import Card, load_json, prepared, save_json, saved_card
from bigjax.data.labelled_words import Sentence, open_sentences
from bigjax.data.passages import masked_tokenizer
from bigjax.data.pipeline import Examples
from bigjax.data.ragged import Ragged, read_ragged, write_ragged
from bigjax.data.subwords import SubwordTokenizer, Template
from bigjax.data.tokenizers import make_tokenizer, read_tokenizer, tokenizer_name
from bigjax.data.user_files import listed
from bigjax.experiment import UsageError
from bigjax.scores.entities import entity_scores, entity_types, score_names


@dataclasses.dataclass(frozen=True)
class LabelRows:
    """Records of a text each; one that is too long is several, cut between words.

    Attributes:
        tokens: the tokens of the texts.
        labels: the label of each token, -1 where it is not the first of a word.
        template: the special tokens around them.
        seq: tokens in a row.
        bounds: first token of each row and the one after it, int64 [N, 2].
        owner: the text of each row, int32 [N].
    """

    tokens: Ragged
    labels: Ragged
    template: Template
    seq: int
    bounds: np.ndarray = dataclasses.field(init=False, repr=False, compare=False)
    owner: np.ndarray = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        room = self.template.room(self.seq, pair=False)
        bounds, owner = [], []
        start = 0
        for text, end in enumerate(self.tokens.ends[:].tolist()):
            for bound in cut_between_words(self.labels.tokens[start:end], room):
                bounds.append((start + bound[0], start + bound[1]))
                owner.append(text)
            start = end
        object.__setattr__(self, 'bounds', np.array(bounds, np.int64).reshape(-1, 2))
        object.__setattr__(self, 'owner', np.array(owner, np.int32))

    def __len__(self) -> int:
        return len(self.bounds)

    def take(self, indices: np.ndarray) -> Examples:
        """Returns 'tokens' and 'labels' int32 [n, seq], -1 for none, and 'text' int32 [n]."""
        tokens = np.empty((len(indices), self.seq), np.int32)
        labels = np.full_like(tokens, -1)
        room = self.template.room(self.seq, pair=False)
        for row, (start, end) in enumerate(self.bounds[indices].tolist()):
            tokens[row] = self.template.join(self.tokens.tokens[start:end], length=self.seq)
            own = self.labels.tokens[start:end][:room]
            labels[row, 1 : 1 + len(own)] = own
        return {'tokens': tokens, 'labels': labels, 'text': self.owner[indices]}


def cut_between_words(labels_T: np.ndarray, room: int) -> list[tuple[int, int]]:
    """Returns bounds of pieces of at most `room` tokens, cut where words begin (label >= 0).

    A word with more tokens than that is a piece of its own, the end of which a row has no room for.
    """
    heads = [*np.flatnonzero(labels_T >= 0).tolist(), len(labels_T)]
    pieces, start = [], 0
    for before, head in itertools.pairwise(heads):
        if head - start > room and before > start:
            pieces.append((start, before))
            start = before
    return [*pieces, (start, len(labels_T))]


@dataclasses.dataclass(frozen=True)
class LabelData:
    """Texts with labelled words, ready for token classification.

    Attributes:
        train: training records.
        test: held-out records.
        class_names: the name of each label.
        tokenizer: how words became tokens.
        card: description.
    """

    train: LabelRows
    test: LabelRows
    class_names: tuple[str, ...]
    tokenizer: SubwordTokenizer
    card: Card

    @property
    def types(self) -> list[str]:
        """The types of entities that the labels mark; none if they are no such marks."""
        return entity_types(self.class_names)

    @property
    def score_names(self) -> tuple[str, ...]:
        """The names of what `score` returns."""
        return score_names(self.types)

    def score(self, pairs: Iterator[tuple[Examples, Examples]]) -> dict[str, float]:
        """Returns precision, recall and F1 of the entities in predictions for held-out texts."""
        return entity_scores(whole_texts(pairs, self.class_names), self.types)


def whole_texts(
    pairs: Iterable[tuple[Examples, Examples]], class_names: Sequence[str]
) -> Iterator[tuple[list[str], list[str]]]:
    """Yields true and predicted labels of each text's words, its rows put together again.

    Args:
        pairs: rows in the order of the records, and 'labels' [n, seq] predicted for them.
        class_names: the name of each label.
    """
    current, truth, guess = None, [], []
    for batch, outputs in pairs:
        for row, text in enumerate(batch['text'].tolist()):
            if text != current and current is not None:
                yield truth, guess
                truth, guess = [], []
            current = text
            words = batch['labels'][row] >= 0
            truth += [class_names[label] for label in batch['labels'][row][words].tolist()]
            guess += [class_names[label] for label in outputs['labels'][row][words].tolist()]
    if current is not None:
        yield truth, guess


def open_token_labels(
    dataset: str, *, seq: int, data_dir: str, tokenizer: str, vocab: int, test_file: str = ''
) -> LabelData:
    """Returns texts with labelled words as rows of tokens, preparing them on first use.

    Args:
        dataset: 'stdlib' (names in the standard library's source), 'conll:FILE' (a word and its
            label a line, the first and the last column; a blank line ends a text) or 'jsonl:FILE'
            (an object a line with the lists "words" and "labels"), or 'blank:CLASSES', which is
            read from nowhere.
        seq: tokens in a row, special ones included.
        data_dir: where prepared data is kept.
        tokenizer: one with special tokens; see `bigjax.data.tokenizers.tokenizer_name`.
        vocab: number of tokens of those that are trained.
        test_file: file of held-out texts in the same form; else a tenth of the texts, by hash.

    Raises:
        UsageError: no such source, nothing there, or damaged files.
    """
    if seq < 8:
        raise UsageError(f'--seq={seq}: must be at least 8; try --seq=128')
    name = tokenizer_name(tokenizer, vocab)
    if dataset.startswith('blank:'):
        from bigjax.data.blank_texts import blank_token_labels

        classes = dataset.removeprefix('blank:')
        return blank_token_labels(classes, seq=seq, tokenizer=tokenizer, vocab=vocab)
    data_dir = os.path.expanduser(data_dir)
    key, read = open_sentences(dataset, test_file, data_dir)

    def write(folder: Path) -> None:
        train, test, card = read()
        texts = lambda: (' '.join(words) for _, words, _ in train)  # noqa: E731
        made = make_tokenizer(folder, tokenizer, vocab=vocab, texts=texts)
        made = masked_tokenizer(made, tokenizer)
        names, notes = label_names(train), list(card.notes)
        if test_file:
            check_seen(test, names, test_file)
        elif lost := [name for name in label_names(test) if name not in names]:
            names = label_names([*train, *test])
            notes.append(
                f'{len(lost)} labels stand in held-out texts only and cannot be learnt: '
                f'{listed(lost)}; add texts, or name another file by --test_file'
            )
        if len(names) < 2:
            raise UsageError(
                f'--dataset={dataset}: all words have the label {names[0]!r}; labels are needed '
                'that differ'
            )
        for split, part in (('train', train), ('test', test)):
            write_aligned(folder, split, part, names, made)
        saved = dataclasses.asdict(dataclasses.replace(card, notes=tuple(notes)))
        about = {'class_names': names, 'card': saved}
        save_json(folder / 'about.json', about)

    folder = prepared(data_dir, f'labels/{key}-{name}', write)
    about = load_json(folder / 'about.json')
    made = masked_tokenizer(read_tokenizer(folder, name), tokenizer)
    assert made.template is not None
    train, test = (
        LabelRows(
            tokens=read_ragged(folder, split),
            labels=read_ragged(folder, f'{split}-labels'),
            template=made.template,
            seq=seq,
        )
        for split in ('train', 'test')
    )
    sizes = {'train': len(train.tokens), 'test': len(test.tokens)}
    notes = []
    if more := len(train) + len(test) - sum(sizes.values()):
        notes = [f'long texts are cut between words, into {more} rows more than there are texts']
    card = saved_card(about['card'], sizes=sizes, notes=notes, unit='texts')
    return LabelData(train, test, tuple(about['class_names']), made, card)


def label_names(sentences: list[Sentence]) -> list[str]:
    """Returns the labels that words have, `O` first, the types in order, B before I."""
    names = {label for _, _, labels in sentences for label in labels}
    return sorted(names, key=lambda name: (name != 'O', name.partition('-')[2], name))


def check_seen(test: list[Sentence], names: list[str], test_file: str) -> None:
    """Raises UsageError where held-out words have labels that no training word has."""
    known = set(names)
    unseen = [(place, label) for place, _, labels in test for label in labels if label not in known]
    if unseen:
        raise UsageError(
            f'--test_file={test_file}: {len(unseen)} words have labels that the training texts have'
            f' not: {listed(sorted({label for _, label in unseen}))}; the first is in '
            f'{unseen[0][0]}; their labels are {listed(names)}'
        )


def write_aligned(
    folder: Path, split: str, part: list[Sentence], names: list[str], made: SubwordTokenizer
) -> None:
    """Writes the tokens of a split's words, and for each its word's label or -1."""
    number = {name: label for label, name in enumerate(names)}
    tokens, labels = [], []
    for _, words, own in part:
        pieces = made.encode_words(words)
        tokens.append(np.array([token for piece in pieces for token in piece], np.int32))
        first = [
            number[label] if place == 0 else -1
            for piece, label in zip(pieces, own, strict=True)
            for place in range(len(piece))
        ]
        labels.append(np.array(first, np.int16))
    write_ragged(folder, split, tokens)
    write_ragged(folder, f'{split}-labels', labels)
