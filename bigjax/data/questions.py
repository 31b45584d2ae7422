"""Extractive question answering: questions and windows of the texts they are about, as rows.

A row is the question, then as much of the text as there is room for; a longer text is covered by
several rows whose windows overlap.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bigjax.data.card import Card, MappedArray, load_json, prepared, save_json, saved_card
from bigjax.data.passages import masked_tokenizer
from bigjax.data.pipeline import Examples
from bigjax.data.ragged import Ragged, read_ragged, write_ragged
from bigjax.data.squad import Asked, open_asked
from bigjax.data.subwords import SubwordTokenizer, Template
from bigjax.data.tokenizers import make_tokenizer, read_tokenizer, tokenizer_name
from bigjax.experiment import UsageError
from bigjax.scores.answers import answer_scores

# What is reported of the answers.
SCORE_NAMES = ('exact_match', 'f1')


@dataclasses.dataclass(frozen=True)
class Windows:
    """Records of a question and a part of its text each.

    Attributes:
        questions: tokens of the questions.
        contexts: tokens of the texts.
        offsets: int32 [tokens, 2], where each token of the texts stands in its text.
        asked: int64 [N, 3], for each question its text and the first and last token of its answer
            there, -1 for none.
        template: the special tokens.
        seq: tokens in a row.
        longest_question: tokens of a question that are read.
        overlap: tokens that two neighbouring windows share.
        bounds: question, first token of its text and the one after it, int64 [rows, 3].
    """

    questions: Ragged
    contexts: Ragged
    offsets: MappedArray | np.ndarray
    asked: MappedArray | np.ndarray
    template: Template
    seq: int
    longest_question: int
    overlap: int
    bounds: np.ndarray = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        sizes = np.minimum(self.questions.lengths(), self.longest_question)
        room = self.template.room(self.seq, pair=True) - sizes
        lengths = self.contexts.lengths()[self.asked[:, 0]]
        bounds = [
            (question, start, min(start + size, length))
            for question, (size, length) in enumerate(
                zip(room.tolist(), lengths.tolist(), strict=True)
            )
            for start in window_starts(length, size, self.overlap)
        ]
        object.__setattr__(self, 'bounds', np.array(bounds, np.int64).reshape(-1, 3))

    def __len__(self) -> int:
        return len(self.bounds)

    def take(self, indices: np.ndarray) -> Examples:
        """Returns rows of tokens, and where the answer stands in them.

        'tokens' int32 [n, seq], -1 = padding; 'start' and 'end' int32 [n], the answer's first and
        last token in the row, both 0 where the window does not hold all of it; 'text' int32 [n, 2],
        the first token of the text and the first after it; 'window' int32 [n], its number.
        """
        tokens, spans = np.empty((len(indices), self.seq), np.int32), []
        for row, (question, start, end) in enumerate(self.bounds[indices].tolist()):
            asked = self.questions.one(question)[: self.longest_question]
            context, first, last = self.asked[question].tolist()
            window = self.contexts.one(context)[start:end]
            tokens[row] = self.template.join(asked, window, length=self.seq)
            begin = 1 + len(asked) + len(self.template.between)
            inside = start <= first and last < end
            answer = (begin + first - start, begin + last - start) if inside else (0, 0)
            spans.append((*answer, begin, begin + end - start))
        spans_B4 = np.array(spans, np.int32).reshape(-1, 4)
        return {
            'tokens': tokens,
            'start': spans_B4[:, 0],
            'end': spans_B4[:, 1],
            'text': spans_B4[:, 2:],
            'window': np.asarray(indices, np.int32),
        }

    def characters(self, window: int, first: int, last: int) -> tuple[int, int, int]:
        """Returns question, and begin and end in its text, of tokens `first` to `last` of a row."""
        question, start, _ = self.bounds[window].tolist()
        asked = min(len(self.questions.one(question)), self.longest_question)
        shift = start - (1 + asked + len(self.template.between))
        context = int(self.asked[question, 0])
        before = int(self.contexts.ends[context - 1]) if context else 0
        offsets = self.offsets[before + shift + first], self.offsets[before + shift + last]
        return question, int(offsets[0][0]), int(offsets[1][1])


def window_starts(length: int, room: int, overlap: int) -> range:
    """Returns where windows of `room` tokens begin that cover `length` and share `overlap`.

    Whatever has at most `overlap` + 1 tokens lies in one of them as a whole.
    """
    step = max(room - overlap, 1)
    return range(0, max(length - overlap, 1), step)


@dataclasses.dataclass(frozen=True)
class QuestionData:
    """Questions about texts, ready for extractive question answering.

    Attributes:
        train: training rows.
        test: held-out rows.
        asked: the held-out questions, with `answers`.
        tokenizer: how texts became tokens.
        card: description.
    """

    train: Windows
    test: Windows
    asked: list[Asked]
    tokenizer: SubwordTokenizer
    card: Card

    def score(self, pairs: Iterator[tuple[Examples, Examples]]) -> dict[str, float]:
        """Returns exact match and F1 of predictions for the rows of `test`."""
        answers = best_answers(pairs, self.test, self.asked)
        return answer_scores((answers[n], one.answers) for n, one in enumerate(self.asked))

    def show(self, batch: Examples, outputs: Examples) -> list[str]:
        """Returns question, answer and truth of each row."""
        texts = []
        for row, window in enumerate(batch['window'].tolist()):
            span = int(outputs['start'][row]), int(outputs['end'][row])
            question, start, end = self.test.characters(window, *span)
            one = self.asked[question]
            texts.append(
                f'question: {one.question}\nanswer:   {one.context[start:end]}\n'
                f'truth:    {" | ".join(one.answers) or "(none)"}'
            )
        return texts


def best_answers(
    pairs: Iterator[tuple[Examples, Examples]], windows: Windows, asked: list[Asked]
) -> list[str]:
    """Returns the answer to each question: the span with the best score in all of its windows.

    Where questions without an answer are among them, the answer is '' if in every window the first
    position has a better score than the best span of all (Devlin et al. 2019, §4.3).
    """
    some_have_none = any(not one.answers for one in asked)
    answers, best = [''] * len(asked), np.full(len(asked), -np.inf)
    none = np.full(len(asked), np.inf)
    for batch, outputs in pairs:
        for row, window in enumerate(batch['window'].tolist()):
            span = int(outputs['start'][row]), int(outputs['end'][row])
            question, start, end = windows.characters(window, *span)
            none[question] = min(none[question], outputs['none'][row])
            if outputs['score'][row] > best[question]:
                best[question] = outputs['score'][row]
                answers[question] = asked[question].context[start:end]
    if some_have_none:
        return [a if b >= n else '' for a, b, n in zip(answers, best, none, strict=True)]
    return answers


def open_questions(
    dataset: str,
    *,
    seq: int,
    data_dir: str,
    tokenizer: str,
    vocab: int,
    test_file: str = '',
    longest_question: int = 64,
    overlap: int = 0,
) -> QuestionData:
    """Returns questions about texts as rows of tokens, preparing them on first use.

    Args:
        dataset: 'stdlib' or 'squad:FILE.json', see `bigjax.data.squad.open_asked`; or 'blank',
            which is read from nowhere.
        seq: tokens in a row.
        data_dir: where prepared data is kept.
        tokenizer: one with special tokens; see `bigjax.data.tokenizers.tokenizer_name`.
        vocab: number of tokens of those that are trained.
        test_file: file of held-out questions; else those about a tenth of the texts.
        longest_question: tokens of a question that are read, a third of a row at most.
        overlap: tokens that neighbouring windows of a text share; 0 takes a third of a row.

    Raises:
        UsageError: no such source, nothing there, damaged files, or windows without room.
    """
    if seq < 32:
        raise UsageError(f'--seq={seq}: must be at least 32 for questions; try --seq=384')
    longest_question, overlap = min(longest_question, seq // 3), overlap or seq // 3
    if overlap > seq // 2:
        raise UsageError(
            f'--overlap={overlap}: must be at most half of --seq={seq}; try --overlap={seq // 3}'
        )
    name = tokenizer_name(tokenizer, vocab)
    if dataset == 'blank':
        from bigjax.data.blank_texts import blank_questions

        sizes = {'longest_question': longest_question, 'overlap': overlap}
        return blank_questions(seq=seq, tokenizer=tokenizer, vocab=vocab, **sizes)
    data_dir = os.path.expanduser(data_dir)
    key, read = open_asked(dataset, test_file, data_dir)

    def write(folder: Path) -> None:
        train, test, card = read()
        texts = lambda: (text for one in train for text in (one.context, one.question))  # noqa: E731
        made = make_tokenizer(folder, tokenizer, vocab=vocab, texts=texts)
        made = masked_tokenizer(made, tokenizer)
        lost = [
            write_asked(folder, s, part, made) for s, part in (('train', train), ('test', test))
        ]
        about = {
            'card': dataclasses.asdict(card), 'lost': sum(lost),
            'asked': [dataclasses.asdict(one) for one in test],
        }  # fmt: skip
        save_json(folder / 'about.json', about)

    folder = prepared(data_dir, f'questions/{key}-{name}', write)
    about = load_json(folder / 'about.json')
    made = masked_tokenizer(read_tokenizer(folder, name), tokenizer)
    assert made.template is not None
    train, test = (
        Windows(
            questions=read_ragged(folder, f'{split}-questions'),
            contexts=read_ragged(folder, f'{split}-contexts'),
            offsets=MappedArray(folder / f'{split}-offsets.npy'),
            asked=MappedArray(folder / f'{split}-asked.npy'),
            template=made.template,
            seq=seq,
            longest_question=longest_question,
            overlap=overlap,
        )
        for split in ('train', 'test')
    )
    asked = [Asked(**{**one, 'answers': tuple(one['answers'])}) for one in about['asked']]
    notes = [f'{len(train)} and {len(test)} windows of the texts']
    if about['lost']:
        notes.append(f'{about["lost"]} answers have no token of their own and count as none')
    sizes = {'train': len(train.questions), 'test': len(test.questions)}
    card = saved_card(about['card'], sizes=sizes, notes=notes, unit='questions')
    return QuestionData(train, test, asked, made, card)


def write_asked(folder: Path, split: str, asked: list[Asked], made: SubwordTokenizer) -> int:
    """Writes the tokens of a split; returns how many answers cover no token."""
    contexts = {text: place for place, text in enumerate(dict.fromkeys(o.context for o in asked))}
    encoded = [made.encode_with_offsets(text) for text in contexts]
    places, lost = [], 0
    for one in asked:
        span = (-1, -1)
        if one.answers:
            offsets = encoded[contexts[one.context]][1]
            inside = (offsets[:, 1] > one.start) & (offsets[:, 0] < one.start + len(one.answers[0]))
            tokens = np.flatnonzero(inside)
            span = (tokens[0], tokens[-1]) if len(tokens) else span
            lost += not len(tokens)
        places.append((contexts[one.context], *span))
    write_ragged(folder, f'{split}-questions', [made.encode(one.question) for one in asked])
    write_ragged(folder, f'{split}-contexts', [tokens for tokens, _ in encoded])
    np.save(folder / f'{split}-offsets.npy', np.concatenate([offsets for _, offsets in encoded]))
    np.save(folder / f'{split}-asked.npy', np.array(places, np.int64))
    return lost
