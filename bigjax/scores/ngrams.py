"""Scores of texts against references: BLEU and chrF by sacrebleu, and ROUGE. All in percent."""

import collections
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

BleuTokenizer = Literal['auto', '13a', 'zh', 'char', 'intl', 'none']

# Letters and digits in a row, or one character of a script that sets no spaces.
_SINGLE = re.compile('[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]')
_WORDS = re.compile(f'{_SINGLE.pattern}|(?:(?!{_SINGLE.pattern})[^\\W_])+')


def bleu_and_chrf(
    texts: Sequence[str], references: Sequence[str], *, tokenize: str = '13a'
) -> dict[str, float]:
    """Returns 'bleu' (Papineni et al. 2002) and 'chrf' (Popović 2015) of a whole set.

    Args:
        texts: what was generated.
        references: one for each text.
        tokenize: sacrebleu's tokenizer of BLEU: '13a', 'zh', 'char', 'intl' or 'none'.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    bleu = BLEU(tokenize=tokenize).corpus_score(list(texts), [list(references)])
    chrf = CHRF().corpus_score(list(texts), [list(references)])
    return {'bleu': bleu.score, 'chrf': chrf.score}


def bleu_tokenizer(language: str) -> str:
    """Returns sacrebleu's tokenizer for a language, such as 'de', 'zh_Hans' or '' (not known)."""
    base = re.split('[_-]', language)[0]
    return {'zh': 'zh', 'ja': 'char', 'ko': 'char', 'th': 'char', 'km': 'char'}.get(base, '13a')


def words(text: str) -> list[str]:
    """Returns the words of a text for ROUGE: letters and digits, in small letters.

    Characters of Chinese, Japanese kana, Thai, Lao, Burmese and Khmer are words of their own. On
    ASCII text it is what Google's rouge_score does without a stemmer.
    """
    return _WORDS.findall(text.lower())


def rouge(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Returns 'rouge_1', 'rouge_2' and 'rouge_l' (Lin 2004): mean F1 over the texts.

    ROUGE-N counts n-grams that both share, as often as both have them; ROUGE-L takes the longest
    common subsequence of the whole texts.
    """
    pairs = zip(texts, references, strict=True)
    scores = [_rouge(words(text), words(wanted)) for text, wanted in pairs]
    means = np.mean(scores, axis=0) if scores else np.zeros(3)
    return dict(zip(('rouge_1', 'rouge_2', 'rouge_l'), (100 * means).tolist(), strict=True))


def _rouge(text: list[str], wanted: list[str]) -> tuple[float, float, float]:
    def shared(n: int) -> float:
        own, other = (
            collections.Counter(zip(*(seq[i:] for i in range(n)), strict=False))
            for seq in (text, wanted)
        )
        return _f1((own & other).total(), own.total(), other.total())

    return shared(1), shared(2), _f1(_common(text, wanted), len(text), len(wanted))


def _f1(shared: int, own: int, other: int) -> float:
    return 2 * shared / (own + other) if own and other else 0.0


def _common(a: list[str], b: list[str]) -> int:
    """Returns the length of the longest common subsequence."""
    number: dict[str, int] = {}
    a_N, b_M = (np.array([number.setdefault(w, len(number)) for w in x], int) for x in (a, b))
    best_M = np.zeros(len(b_M) + 1, int)
    for word in a_N:
        # A match extends what was best before it; else the best so far to the left stands.
        matched_M = np.where(b_M == word, best_M[:-1] + 1, best_M[1:])
        best_M[1:] = np.maximum.accumulate(np.maximum(matched_M, best_M[1:]))
    return int(best_M[-1])
