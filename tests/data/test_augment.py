import numpy as np

from bigjax.data.augment import Shift, chain, flip


def examples():
    pixels = np.random.default_rng(0).integers(1, 256, (200, 5, 4, 3), np.uint8)
    return {'image': pixels, 'label': np.arange(200)}


RNG = np.random.default_rng(1)


def uniform(k):
    return RNG.random((200, k))


def test_flip_mirrors_about_half_of_the_rows_and_nothing_else():
    before = examples()
    after = flip(before, uniform)
    same = (after['image'] == before['image']).all((1, 2, 3))
    mirrored = (after['image'] == before['image'][:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert 60 < same.sum() < 140
    assert after['label'] is before['label']
    np.testing.assert_array_equal(before['image'], examples()['image'])


def test_shift_moves_the_image_and_fills_with_zeros():
    before = examples()
    after = Shift(2)(before, uniform)['image']
    padded = np.pad(before['image'], ((0, 0), (2, 2), (2, 2), (0, 0)))
    places = set()
    for row in range(200):
        found = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if (padded[row, top : top + 5, left : left + 4] == after[row]).all()
        ]
        assert len(found) == 1
        places.update(found)
    assert len(places) == 25
    assert after.flags.c_contiguous


def test_no_shift_is_the_identity_and_chains_apply_in_order():
    before = examples()
    np.testing.assert_array_equal(Shift(0)(before, uniform)['image'], before['image'])
    calls = []

    def record(name):
        def step(examples, uniform):
            calls.append((name, uniform(1).shape))
            return examples

        return step

    chain(record('a'), record('b'))(before, uniform)
    assert calls == [('a', (200, 1)), ('b', (200, 1))]
