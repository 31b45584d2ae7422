"""A shuffle that is never stored: position in an epoch -> record, computed."""

import functools
import math

import numpy as np

ROUNDS = 6


def shuffled(position: int, rows: int, size: int, *, seed: int) -> np.ndarray:
    """Returns the records at positions `position` .. `position + rows` of an endless shuffle.

    Epochs stand back to back; each is a permutation of `size` records of its own, a pure function
    of (seed, epoch). Memory is O(rows), whatever `size` is.

    Args:
        position: first position, counted from the start of training.
        rows: how many consecutive positions.
        size: number of records in an epoch.
        seed: chooses the permutations.

    Returns:
        int64 [rows], each in [0, size).
    """
    out = np.empty(rows, np.int64)
    row = 0
    while row < rows:
        epoch, first = divmod(position + row, size)
        count = min(rows - row, size - first)
        places = np.arange(first, first + count)
        out[row : row + count] = permute(places, size, epoch_key(seed, epoch))
        row += count
    return out


@functools.lru_cache(maxsize=16)
def epoch_key(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    """Returns the round keys of one epoch's permutation."""
    # Hashed, not added: epoch 1 of seed 0 must not be epoch 0 of seed 1.
    return tuple(np.random.SeedSequence((seed, epoch)).generate_state(ROUNDS, np.uint64))


def permute(x: np.ndarray, size: int, key: tuple[np.uint64, ...]) -> np.ndarray:
    """Applies a keyed permutation of range(size) to each element of `x`.

    A generalised Feistel network on pairs below a = ceil(sqrt(size)), walked until it falls inside
    the range (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    grain.experimental.index_shuffle does the same one index a call; this, a whole batch at once.

    Args:
        x: integers [n], each in [0, size).
        size: size of the range, at most 2**62.
        key: one 64-bit word a round.

    Returns:
        int64 [n]; distinct for distinct inputs.
    """
    a = np.uint64(math.isqrt(size - 1) + 1)
    left, right = np.divmod(x.astype(np.uint64), a)
    for word in key:
        # splitmix64's multipliers; only that the round depends on all bits matters.
        mixed = (right ^ word) * np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(31)
        mixed *= np.uint64(0x94D049BB133111EB)
        mixed >>= np.uint64(32)  # so that the sum below cannot wrap
        left, right = right, (left + mixed) % a
    out = (left * a + right).astype(np.int64)
    outside = out >= size
    if outside.any():
        out[outside] = permute(out[outside], size, key)
    return out
