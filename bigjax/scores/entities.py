"""Entities in sequences of labels, and how well they were found: precision, recall, F1."""

from collections.abc import Iterable, Sequence

Entity = tuple[str, int, int]


def entities(labels: Sequence[str]) -> set[Entity]:
    """Returns (type, first word, last word) of the entities that a sequence of labels marks.

    Labels are `O`, or a letter of B, I, E, S and a type, as `B-person`. An entity goes on from one
    word to the next if the first has B or I, the second I or E, and both the same type; all else
    begins a new one, so that an I after an O does, too. This is the reading of the CoNLL 2003
    evaluation, and seqeval's unless it is told to be strict.
    """
    found, begin = set(), 0
    for place, label in enumerate(labels):
        letter, kind = split_label(label)
        if letter == 'O':
            continue
        before = split_label(labels[place - 1]) if place else ('O', '')
        if not (letter in 'IE' and before[0] in 'BI' and before[1] == kind):
            begin = place
        after = split_label(labels[place + 1]) if place + 1 < len(labels) else ('O', '')
        if not (letter in 'BI' and after[0] in 'IE' and after[1] == kind):
            found.add((kind, begin, place))
    return found


def split_label(label: str) -> tuple[str, str]:
    """Returns letter and type of a label."""
    letter, _, kind = label.partition('-')
    return letter, kind


def entity_types(class_names: Iterable[str]) -> list[str]:
    """Returns the types that labels name, sorted; none where they are no marks of entities."""
    split = [split_label(name) for name in class_names]
    if not all(
        letter == 'O' or (letter in ('B', 'I', 'E', 'S') and kind) for letter, kind in split
    ):
        return []
    return sorted({kind for letter, kind in split if letter != 'O'})


def score_names(types: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of what `entity_scores` gives."""
    return ('precision', 'recall', 'f1', *(f'f1_{kind}' for kind in types))


def entity_scores(
    pairs: Iterable[tuple[Sequence[str], Sequence[str]]], types: Sequence[str]
) -> dict[str, float]:
    """Returns precision, recall and F1 of all entities, and the F1 of each type.

    An entity is found if its type and both of its ends are right. Without any, a score is 0.

    Args:
      pairs: true and predicted labels of each text.
      types: the types to report.
    """
    true, said, right = (dict.fromkeys(types, 0) for _ in range(3))
    for truth, guess in pairs:
        wanted, given = entities(truth), entities(guess)
        for counts, found in ((true, wanted), (said, given), (right, wanted & given)):
            for kind, _, _ in found:
                counts[kind] += 1
    totals = [sum(counts.values()) for counts in (right, said, true)]
    scores = {'precision': _share(totals[0], totals[1]), 'recall': _share(totals[0], totals[2])}
    scores['f1'] = _share(2 * totals[0], totals[1] + totals[2])
    for kind in types:
        scores[f'f1_{kind}'] = _share(2 * right[kind], said[kind] + true[kind])
    return scores


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
