"""Questions about texts, read from SQuAD's JSON format and the standard library's docstrings."""

import dataclasses
import json
from collections.abc import Callable

from bigjax.data.card import Card
from bigjax.data.corpora import fingerprint, stdlib_files
from bigjax.data.user_files import file_stats, hold_out, named_files, read_text, try_instead
from bigjax.experiment import UsageError
from bigjax.scores.answers import normalized


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question about a text.

    Attributes:
        context: the text.
        question: the question.
        answers: answers that are right; none where the text has none.
        start: characters of the text before the first answer.
    """

    context: str
    question: str
    answers: tuple[str, ...] = ()
    start: int = 0


Read = Callable[[], tuple[list[Asked], list[Asked], Card]]


def open_asked(dataset: str, test_file: str, data_dir: str) -> tuple[str, Read]:
    """Returns a key of exactly these questions, and what reads those for training and for testing.

    Args:
        dataset: 'stdlib' (what docstrings say functions return or raise) or 'squad:FILE.json'.
        test_file: file of held-out questions; else those about a tenth of the texts, by hash.
        data_dir: where prepared data is kept.
    """
    prefix, _, rest = dataset.partition(':')
    if dataset == 'stdlib':
        return stdlib_asked(data_dir)
    if prefix != 'squad' or not rest:
        raise UsageError(
            f'--dataset={dataset}: no such source of questions; there are stdlib and '
            'squad:FILE.json; ' + try_instead(dataset, 'squad', 'stdlib')
        )
    files = named_files(dataset, rest, test_file)
    stats = file_stats(files.values())

    def read() -> tuple[list[Asked], list[Asked], Card]:
        train, *others = [read_squad(path, flag) for flag, path in files.items()]
        if not others:
            train, *others = hold_out(train, lambda one: one.context, dataset)
        description = 'Questions about texts, in the format of SQuAD.'
        return train, others[0], Card(name=dataset, description=description, path=stats[0][0])

    return f'squad-{fingerprint(stats)}', read


def read_squad(path: str, flag: str) -> list[Asked]:
    """Returns the questions of a file in SQuAD's format, 1.1 or 2.0 (rajpurkar.github.io).

    Raises:
        UsageError: it is not in this format, or an answer does not stand where it says.
    """
    found: list[Asked] = []
    try:
        for entry in json.loads(read_text(path, flag))['data']:
            for paragraph in entry['paragraphs']:
                for one in paragraph['qas']:
                    found.append(read_question(paragraph['context'], one, flag))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f'{flag}: not in the format of SQuAD after {len(found)} questions '
            f'({type(error).__name__}: {error}); it is {{"data": [{{"paragraphs": [{{"context", '
            '"qas": [{"question", "answers": [{"text", "answer_start"}]}]}]}]}'
        ) from error
    if not found:
        raise UsageError(f'{flag}: the file has no questions in it')
    return found


def read_question(context: str, one: dict, flag: str) -> Asked:
    """Returns one question about a text."""
    answers = [] if one.get('is_impossible') else one['answers']
    for answer in answers:
        start, text = answer['answer_start'], answer['text']
        if not text or context[start : start + len(text)] != text:
            raise UsageError(
                f'{flag}: the answer {text!r} of question {one.get("id", one["question"])!r} does '
                f'not stand at character {start} of its text'
            )
    # SQuAD does not count answers of articles and punctuation alone, if there are others.
    texts = [a['text'] for a in answers if normalized(a['text'])] or [a['text'] for a in answers]
    start = answers[0]['answer_start'] if answers else 0
    first = [a['text'] for a in answers[:1]]
    return Asked(context, one['question'], tuple(dict.fromkeys([*first, *texts])), start)


def stdlib_asked(data_dir: str) -> tuple[str, Read]:
    """Returns questions about the docstrings of the standard library."""
    root, splits, python, key = stdlib_files()

    def read() -> tuple[list[Asked], list[Asked], Card]:
        from bigjax.data import source_builders as sources

        config = sources.FilesConfig(name=key, root=root, splits=splits)
        about = f'What functions in the standard library of {python} return or raise.'
        builder, card = sources.prepare(
            sources.DocstringQuestions, config, about, data_dir=data_dir
        )
        train, test = (
            [
                Asked(
                    row['context'].decode(),
                    row['question'].decode(),
                    (row['answer'].decode(),),
                    int(row['start']),
                )
                for row in builder.as_data_source(split=split)
            ]
            for split in ('train', 'validation')
        )
        return train, test, card

    return f'stdlib-{key}', read
