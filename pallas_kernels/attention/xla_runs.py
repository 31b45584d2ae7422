"""In which pieces a CPU computes attention: chunks of queries, each with the keys it can see.

Legend: B batch, T queries, S keys and values, H query heads.
"""

from typing import NamedTuple

# Scores held at a time, where they could be more than that of a few activations.
_SCORES = 2**22
_SHORT = 512 * 512
# Chunks of a triangle: more than eight only cost compile time, for the share of hidden scores that
# are computed is down to a sixteenth by then.
_STEPS = 8
_LEAST = 64


class Run(NamedTuple):
    """`count` chunks of `queries` from query `first`, each with `keys` keys from `first_key`.

    If `slides`, the keys move along with the chunks, as far as there are any.
    """

    first: int
    queries: int
    count: int
    first_key: int
    keys: int
    slides: bool = False


def runs(
    B: int, T: int, S: int, H: int, left: int | None, right: int | None, shift: int
) -> list[Run]:
    """Returns the runs that cover all queries, in order.

    Args:
      B: batch.
      T: queries.
      S: keys.
      H: query heads.
      left: how many keys before its own position a query sees; None is all.
      right: how many behind it.
      shift: position of the first query among the keys.
    """
    fits = T * S if is_short(T, S) else max(1, _SCORES // (B * H))
    step = T if left is None and right is None else max(_LEAST, _round(-(-T // _STEPS)))
    if left is not None and right is not None:
        queries = max(_LEAST, _round((left + right) // 2))
        queries = min(queries, max(1, fits // (queries + left + right)))
        if 2 * (queries + left + right) < step + left + right:
            return _sliding(T, S, queries, left, right, shift)
    found = []
    for first in range(0, T, step):
        end = min(first + step, T)
        low = 0 if left is None else min(max(first + shift - left, 0), S - 1)
        high = S if right is None else min(max(end + shift + right, low + 1), S)
        found += _even(first, end, max(1, fits // (high - low)), low, high - low)
    return found


def is_short(T: int, S: int) -> bool:
    """Whether all scores of a call may be held at once."""
    return T * S <= _SHORT


def _sliding(T: int, S: int, queries: int, left: int, right: int, shift: int) -> list[Run]:
    keys = min(S, queries + left + right)
    return [
        run._replace(first_key=run.first + shift - left, slides=True)
        for run in _even(0, T, queries, 0, keys)
    ]


def _even(first: int, end: int, most: int, first_key: int, keys: int) -> list[Run]:
    """Returns chunks of at most `most` queries, as even as that allows."""
    size = end - first
    queries = -(-size // -(-size // most))
    count, rest = divmod(size, queries)
    found = [Run(first, queries, count, first_key, keys)]
    if rest:
        found.append(Run(end - rest, rest, 1, first_key, keys))
    return found


def _round(n: int) -> int:
    return -(-n // 16) * 16
