import numpy as np

from bigjax.data.augment import Erase, Shift, chain, flip


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


def test_erasing_covers_a_rectangle_of_the_papers_size_with_noise():
    before = {'image': np.full((3000, 32, 40, 1), 7, np.uint8), 'label': 'kept'}
    rng = np.random.default_rng(2)
    after = Erase(0.5)(before, lambda k: rng.random((3000, k)))
    assert after['label'] == 'kept'
    assert (before['image'] == 7).all()
    areas, aspects, noise = [], [], []
    for image in after['image'][..., 0]:
        rows, columns = np.nonzero(image != 7)
        if not rows.size:
            continue
        box = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (box != 7).mean() > 0.9  # One level of 256 is 7 by chance.
        areas.append(box.size / (32 * 40))
        aspects.append(box.shape[1] / box.shape[0])
        noise.append(box.ravel())
    np.testing.assert_allclose(len(areas) / 3000, 0.5, atol=0.04)
    assert min(areas) > 0.01
    assert max(areas) < 0.43
    # What does not fit is drawn again, which favours small ones a little.
    np.testing.assert_allclose(np.mean(areas), 0.2, atol=0.015)
    assert 0.2 < min(aspects) < 0.4
    assert 2.5 < max(aspects) < 4
    np.testing.assert_allclose(np.concatenate(noise).mean(), 127.5, atol=1)
    assert len({part.tobytes() for part in noise}) == len(noise)


def test_erasing_with_probability_0_or_of_a_tiny_image_is_safe():
    before = examples()
    np.testing.assert_array_equal(Erase(0.0)(before, uniform)['image'], before['image'])
    tiny = {'image': np.zeros((200, 1, 1, 1), np.uint8)}
    np.testing.assert_array_equal(Erase(1.0)(tiny, uniform)['image'], tiny['image'])
