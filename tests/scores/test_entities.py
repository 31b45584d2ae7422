"""Entities: what labels mark, and the scores; the cases are those where readings differ."""

import pytest

from bigjax.scores.entities import entities, entity_scores, entity_types, score_names


@pytest.mark.parametrize(
    ('labels', 'found'),
    [
        ('', set()),
        ('O O', set()),
        ('B-a I-a O B-b', {('a', 0, 1), ('b', 3, 3)}),
        ('B-a B-a', {('a', 0, 0), ('a', 1, 1)}),
        ('O I-a I-a', {('a', 1, 2)}),  # an I after an O begins
        ('B-a I-b', {('a', 0, 0), ('b', 1, 1)}),  # a change of type begins
        ('B-a I-a E-a S-b I-b', {('a', 0, 2), ('b', 3, 3), ('b', 4, 4)}),
        ('B-x-y I-x-y', {('x-y', 0, 1)}),
    ],
)
def test_what_labels_mark(labels, found):
    assert entities(labels.split()) == found


def test_types_are_known_from_the_labels_or_there_are_none():
    assert entity_types(['O', 'I-b', 'B-b', 'B-a']) == ['a', 'b']
    assert entity_types(['NOUN', 'VERB']) == []
    assert entity_types(['O', 'B-']) == []
    assert score_names(['a']) == ('precision', 'recall', 'f1', 'f1_a')


def test_an_entity_counts_when_type_and_both_ends_are_right():
    truth = ['B-a', 'I-a', 'O', 'B-b', 'O', 'B-a']
    guess = ['B-a', 'O', 'O', 'B-b', 'B-b', 'B-b']
    # One of three true ones is found among four that are said.
    scores = entity_scores([(truth, guess)], ['a', 'b'])
    assert scores == pytest.approx(
        {'precision': 1 / 4, 'recall': 1 / 3, 'f1': 2 / 7, 'f1_a': 0.0, 'f1_b': 2 / 4}
    )


def test_scores_of_several_texts_are_of_all_their_entities_together():
    right, wrong = (['B-a', 'O', 'B-a'],) * 2, (['B-a'], ['O'])
    assert entity_scores([right, wrong], ['a'])['recall'] == 2 / 3
    assert entity_scores([], ['a']) == {'precision': 0, 'recall': 0, 'f1': 0, 'f1_a': 0}
