"""Labels in rows of the user's CSV files: what is refused, and what a person is told of.

Rows have a text, its label and maybe a second text.
"""

import collections
from collections.abc import Iterable

from bigjax.data.csv_rows import Rows
from bigjax.data.user_files import listed
from bigjax.experiment import UsageError


def check_labels(rows: Rows, flag: str) -> None:
    """Raises UsageError where a row has no label."""
    bad = [line for line, row in rows if not row[1].strip()]
    if bad:
        raise UsageError(
            f'{flag}: {len(bad)} rows have no label, the first is line {bad[0]}; label or remove '
            'them'
        )


def with_plain_labels(rows: Rows) -> Rows:
    """Returns the rows without the spaces around labels, which would make them other labels."""
    return [(line, [text, label.strip(), *pair]) for line, (text, label, *pair) in rows]


def check_seen(test: Rows, train: Rows, test_path: str, path: str) -> None:
    """Raises UsageError where held-out rows have labels that no training row has."""
    seen = {row[1] for _, row in train}
    unseen = [(line, row[1]) for line, row in test if row[1] not in seen]
    if unseen:
        raise UsageError(
            f'--test_file={test_path}: {len(unseen)} rows have labels that {path} has not: '
            f'{listed(sorted({label for _, label in unseen}))}; the first is line '
            f'{unseen[0][0]}; its labels are {listed(class_names(seen))}'
        )


def noticed(rows: Rows, path: str, *, pair: bool) -> list[str]:
    """Returns what a person should know of the rows of a CSV file, all of which are kept."""
    notes = []
    for place, what in ((0, 'text'), (2, 'second text'))[: 2 if pair else 1]:
        empty = [line for line, row in rows if not row[place].strip()]
        if empty:
            notes.append(
                f'{path}: {len(empty)} of {len(rows)} rows have an empty {what}, the first is '
                f'line {empty[0]}'
            )
        broken = [line for line, row in rows if '\0' in row[place] or '\ufffd' in row[place]]
        if broken:
            notes.append(
                f'{path}: {len(broken)} of {len(rows)} rows have characters in the {what} that a '
                f'wrong encoding leaves (NUL or U+FFFD), the first is line {broken[0]}'
            )
    if wide := [line for line, row in rows if row[1] != row[1].strip()]:
        notes.append(
            f'{path}: {len(wide)} of {len(rows)} rows have spaces around the label, which are '
            f'left out, the first is line {wide[0]}'
        )
    labels, spelt = collections.defaultdict(set), collections.defaultdict(set)
    for _, row in rows:
        label = row[1].strip()
        labels[row[0], *row[2:]].add(label)
        spelt[label.casefold()].add(label)
    if several := sum(len(found) > 1 for found in labels.values()):
        notes.append(f'{path}: {several} texts stand there with different labels')
    if alike := [' and '.join(sorted(found)) for found in spelt.values() if len(found) > 1]:
        notes.append(f'{path}: labels that differ in case only are different: {listed(alike)}')
    return notes


def noticed_held_out(test: Rows, train: Rows, path: str) -> list[str]:
    """Returns a note where labels stand in held-out rows only."""
    lost = {row[1] for _, row in test} - {row[1] for _, row in train}
    if not lost:
        return []
    return [
        f'{path}: {len(lost)} labels stand in held-out rows only and cannot be learnt: '
        f'{listed(class_names(lost))}; add rows, or name another file by --test_file'
    ]


def noticed_in_both(test: Rows, train: Rows, test_path: str, path: str) -> list[str]:
    """Returns a note where held-out rows have texts that are trained on."""
    seen = {(row[0], *row[2:]) for _, row in train}
    both = [line for line, row in test if (row[0], *row[2:]) in seen]
    if not both:
        return []
    return [
        f'{test_path}: {len(both)} of {len(test)} rows have a text that {path} has, too, the first '
        f'is line {both[0]}'
    ]


def class_names(labels: Iterable[str]) -> list[str]:
    """Returns the distinct labels, in numerical order if all are whole numbers."""
    names = set(labels)
    try:
        return sorted(names, key=int)
    except ValueError:
        return sorted(names)
