"""Scores of texts: ROUGE against Google's figures and by hand, BLEU and chrF of clear cases."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigjax.scores.ngrams import bleu_and_chrf, bleu_tokenizer, rouge, words

quick = settings(max_examples=40, deadline=None)
texts = st.lists(st.sampled_from(['the', 'cat', 'sat', 'on', 'a', 'mat']), max_size=7).map(' '.join)


@pytest.mark.parametrize(
    ('text', 'wanted', 'scores'),
    [
        # rouge_score 0.1.2 without a stemmer says these, in percent.
        ('the cat sat on the mat', 'the cat sat on the mat', (100, 100, 100)),
        ('the cat sat', 'The cat is on the mat.', (44.4444, 28.5714, 44.4444)),
        ('mat the on', 'on the mat', (100, 0, 33.3333)),
        ('x-ray_12 ok', 'X RAY 12', (85.7143, 80, 85.7143)),
        ('', 'the cat', (0, 0, 0)),
        ('the the the', 'the', (50, 0, 50)),
    ],
)
def test_rouge(text, wanted, scores):
    found = rouge([text], [wanted])
    assert list(found) == ['rouge_1', 'rouge_2', 'rouge_l']
    assert list(found.values()) == pytest.approx(scores, abs=1e-3)


def longest_common(a, b):
    """By its definition, for short texts."""
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + longest_common(a[:-1], b[:-1])
    return max(longest_common(a[:-1], b), longest_common(a, b[:-1]))


@quick
@given(texts, texts)
def test_rouge_l_takes_the_longest_common_subsequence(text, wanted):
    a, b = text.split(), wanted.split()
    expected = 200 * longest_common(a, b) / (len(a) + len(b)) if a and b else 0
    assert rouge([text], [wanted])['rouge_l'] == pytest.approx(expected)


def test_rouge_is_the_mean_over_texts():
    found = rouge(['a b', 'a b'], ['a b', 'c d'])
    assert found == {'rouge_1': 50, 'rouge_2': 50, 'rouge_l': 50}


def test_words_of_scripts_without_spaces_are_characters():
    assert words('Über 3 Änderungen: 保存文件 v2') == [
        'über', '3', 'änderungen', '保', '存', '文', '件', 'v2',
    ]  # fmt: skip


def test_bleu_and_chrf():
    wanted = ['the cat sat on the mat today', 'nothing is there to be seen at all']
    assert bleu_and_chrf(wanted, wanted) == pytest.approx({'bleu': 100, 'chrf': 100})
    other = bleu_and_chrf(['the cat sat on a mat today', 'there is nothing'], wanted)
    assert 0 < other['bleu'] < other['chrf'] < 100
    # Chinese is counted by characters: as one word, nothing would match.
    assert bleu_and_chrf(['保存所有文件吗'], ['保存所有文件'], tokenize='zh')['bleu'] > 50
    assert bleu_and_chrf(['保存所有文件吗'], ['保存所有文件'], tokenize='none')['bleu'] < 1


@pytest.mark.parametrize(
    ('language', 'tokenizer'),
    [('zh', 'zh'), ('zh_Hans', 'zh'), ('de', '13a'), ('ja', 'char'), ('', '13a')],
)
def test_the_tokenizer_follows_the_language(language, tokenizer):
    assert bleu_tokenizer(language) == tokenizer
