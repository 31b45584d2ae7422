import collections
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bigjax.data.shuffle import shuffled


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 500), st.integers(0, 2**32), st.integers(0, 5), st.integers(1, 70))
def test_every_record_once_an_epoch_however_it_is_cut(size, seed, epoch, rows):
    first = epoch * size
    parts = [
        shuffled(start, min(rows, first + size - start), size, seed=seed)
        for start in range(first, first + size, rows)
    ]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(size))


def test_a_range_over_several_epochs_is_their_concatenation():
    whole = shuffled(3, 40, 7, seed=5)
    parts = [shuffled(position, 1, 7, seed=5) for position in range(3, 43)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {
        tuple(shuffled(epoch * 50, 50, 50, seed=seed)) for epoch in range(4) for seed in range(4)
    }
    assert len(orders) == 16


def test_all_orders_come_up():
    trials = 4000
    orders = collections.Counter(tuple(shuffled(e * 4, 4, 4, seed=1)) for e in range(trials))
    assert len(orders) == math.factorial(4)
    assert min(orders.values()) > trials / 24 / 2


def test_places_are_even():
    size, trials = 30, 3000
    counts = np.zeros((size, size))
    for epoch in range(trials):
        counts[np.arange(size), shuffled(epoch * size, size, size, seed=2)] += 1
    mean = trials / size
    chi_squared = ((counts - mean) ** 2 / mean).sum() / (size - 1) ** 2
    assert 0.8 < chi_squared < 1.25


def test_a_huge_set_costs_no_memory():
    indices = shuffled(10**13, 1000, 10**12, seed=0)
    assert len(set(indices.tolist())) == 1000
    assert indices.min() >= 0
    assert 10**11 < indices.max() < 10**12
