"""How well questions are answered: exact match and F1, as SQuAD counts them."""

import collections
import re
import string
from collections.abc import Iterable, Sequence

_PUNCTUATION = str.maketrans('', '', string.punctuation)
_ARTICLES = re.compile(r'\b(a|an|the)\b')


def normalized(text: str) -> str:
    """Returns a text in lower case, without punctuation, articles and runs of spaces.

    SQuAD's official evaluation compares answers in this form (Rajpurkar et al. 2016, §6.1).
    """
    return ' '.join(_ARTICLES.sub(' ', text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, truths: Sequence[str]) -> float:
    """Returns 1 if an answer equals one of the true ones, normalized, else 0.

    Without a true answer, '' is right.
    """
    return float(any(normalized(answer) == normalized(truth) for truth in truths or ['']))


def overlap_f1(answer: str, truths: Sequence[str]) -> float:
    """Returns the F1 of an answer's words against those of the true answer that it is nearest to.

    Words are counted as often as they occur. If either side has none, it is 1 if both have none,
    else 0.
    """
    return max(_f1(normalized(answer).split(), normalized(t).split()) for t in truths or [''])


def _f1(said: list[str], true: list[str]) -> float:
    if not said or not true:
        return float(said == true)
    common = sum((collections.Counter(said) & collections.Counter(true)).values())
    return 2 * common / (len(said) + len(true))


def answer_scores(pairs: Iterable[tuple[str, Sequence[str]]]) -> dict[str, float]:
    """Returns the means of both over questions: 'exact_match' and 'f1', between 0 and 1.

    Args:
      pairs: the answer given to each question ('' for none) and the true ones.
    """
    found = [(exact_match(*pair), overlap_f1(*pair)) for pair in pairs]
    count = max(len(found), 1)
    return {
        'exact_match': sum(exact for exact, _ in found) / count,
        'f1': sum(f1 for _, f1 in found) / count,
    }
