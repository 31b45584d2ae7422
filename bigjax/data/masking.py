"""Masked language modelling: which tokens are hidden, and by what (Devlin et al. 2019, §3.1).

Legend: B rows, T tokens of a row, P tokens predicted at most.
"""

from collections.abc import Callable

import numpy as np

from bigjax.data.pipeline import Augment, Examples, Records, Uniform
from bigjax.data.subwords import SubwordTokenizer

# Of the tokens that are to be predicted: hidden behind [MASK], replaced by any token, kept.
MASKED, REPLACED = 0.8, 0.1


class Masking:
    """Chooses `rate` of each row's tokens and hides most of them; an augmentation.

    Special tokens and padding are never chosen. Of a row with n others, round(rate * n) are, one at
    least. Each is replaced by the mask with probability 0.8 and by a random ordinary token with
    probability 0.1. With whole words, a word is chosen with all its tokens or not at all, in random
    order until the number is reached, as far as it can be; what is longer than the number is taken
    apart.
    """

    def __init__(
        self,
        tokenizer: SubwordTokenizer,
        *,
        length: int,
        rate: float = 0.15,
        whole_words: bool = False,
    ):
        """Prepares.

        Args:
            tokenizer: has a mask token.
            length: T.
            rate: share of tokens to predict, above 0 and below 1.
            whole_words: whether the tokens of a word are chosen together.
        """
        assert tokenizer.mask is not None
        self.mask = tokenizer.mask
        self.special = tokenizer.special
        self.continues = tokenizer.continues
        self.ordinary = np.flatnonzero(~tokenizer.special)
        self.rate, self.whole_words = rate, whole_words
        self.predictions = max(1, round(rate * length))

    def __call__(self, examples: Examples, uniform: Uniform) -> Examples:
        """Returns the examples with other 'tokens', and what to predict.

        Args:
            examples: 'tokens' int32 [B, T], negative = padding; other keys are passed on.
            uniform: draws; see `bigjax.data.pipeline.train_batches`.

        Returns:
            'tokens'; 'positions' int32 [B, P] of what is predicted, ascending, 0 where there is
            less; 'targets' int32 [B, P], the tokens that stood there, -1 where there is less.
        """
        tokens_BT = examples['tokens']
        candidate_BT = (tokens_BT >= 0) & ~self.special[np.maximum(tokens_BT, 0)]
        count_B = candidate_BT.sum(1)
        count_B = np.minimum(np.maximum(np.rint(self.rate * count_B), 1), count_B)
        count_B = np.minimum(count_B, self.predictions).astype(np.int64)
        draw_BT = uniform(tokens_BT.shape[1])
        choose = self._whole_words if self.whole_words else self._tokens
        chosen_BT = choose(tokens_BT, candidate_BT, count_B, draw_BT)
        # The chosen positions in order, then any others.
        positions_BP = np.argsort(~chosen_BT, axis=1, kind='stable')[:, : self.predictions]
        real_BP = np.arange(positions_BP.shape[1])[None] < chosen_BT.sum(1)[:, None]
        positions_BP = np.where(real_BP, positions_BP, 0)
        targets_BP = np.where(real_BP, np.take_along_axis(tokens_BT, positions_BP, 1), -1)
        hidden_BT = self._hide(tokens_BT, chosen_BT, uniform)
        return {
            **examples,
            'tokens': hidden_BT.astype(np.int32),
            'positions': positions_BP.astype(np.int32),
            'targets': targets_BP.astype(np.int32),
        }

    def _hide(self, tokens_BT, chosen_BT, uniform: Uniform) -> np.ndarray:
        length = tokens_BT.shape[1]
        action_BT, which_BT = np.split(uniform(2 * length), 2, axis=1)
        other_BT = self.ordinary[(which_BT * len(self.ordinary)).astype(np.int64)]
        new_BT = np.where(action_BT < MASKED + REPLACED, other_BT, tokens_BT)
        new_BT = np.where(action_BT < MASKED, self.mask, new_BT)
        return np.where(chosen_BT, new_BT, tokens_BT)

    def _tokens(self, tokens_BT, candidate_BT, count_B, draw_BT) -> np.ndarray:
        order_BT = np.argsort(np.where(candidate_BT, draw_BT, 2.0), axis=1)
        rank_BT = np.argsort(order_BT, axis=1)
        return rank_BT < count_B[:, None]

    def _whole_words(self, tokens_BT, candidate_BT, count_B, draw_BT) -> np.ndarray:
        chosen_BT = np.zeros(tokens_BT.shape, bool)
        before_BT = np.pad(candidate_BT, ((0, 0), (1, 0)))[:, :-1]
        goes_on_BT = self.continues[np.maximum(tokens_BT, 0)] & before_BT
        for row, (candidate_T, goes_on_T) in enumerate(zip(candidate_BT, goes_on_BT, strict=True)):
            left = count_B[row]
            for word in words(candidate_T, goes_on_T, draw_BT[row], longest=left):
                if len(word) <= left:
                    chosen_BT[row, word] = True
                    left -= len(word)
                if not left:
                    break
        return chosen_BT


def words(
    candidate_T: np.ndarray, goes_on_T: np.ndarray, draw_T: np.ndarray, *, longest: int
) -> list[np.ndarray]:
    """Returns the positions of each word, in the order of the draws of their first tokens."""
    places = np.flatnonzero(candidate_T)
    found = np.split(places, np.flatnonzero(~goes_on_T[places])[1:]) if len(places) else []
    pieces: list[np.ndarray] = []
    for word in found:
        pieces += [word] if len(word) <= longest else np.split(word, len(word))
    return sorted(pieces, key=lambda word: draw_T[word[0]])


class Fixed:
    """Records that an augmentation has changed, each by draws of its own that never change."""

    def __init__(self, records: Records, augment: Augment, *, seed: int = 0):
        """Prepares.

        Args:
            records: the records.
            augment: what is done to them.
            seed: of the draws; record i gets those of (seed, i), whatever it is read with.
        """
        self.records, self.augment, self.seed = records, augment, seed

    def __len__(self) -> int:
        return len(self.records)

    def take(self, indices: np.ndarray) -> Examples:
        return self.augment(self.records.take(indices), row_draws(self.seed, indices))


def row_draws(seed: int, indices: np.ndarray) -> Callable[[int], np.ndarray]:
    """Returns `uniform(k)`: float64 [n, k] in [0, 1), row r a function of (seed, indices[r])."""
    calls = 0

    def uniform(k: int) -> np.ndarray:
        nonlocal calls
        calls += 1
        streams = (np.random.Philox(key=seed, counter=[0, 0, calls, i]) for i in indices.tolist())
        return np.stack([np.random.Generator(stream).random(k) for stream in streams])

    return uniform
