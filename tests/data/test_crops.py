import io

import numpy as np
import pytest
from PIL import Image

from bigjax.data.crops import RandomCrop, boxes
from bigjax.data.decode import Encoded

RNG = np.random.default_rng(0)


def uniform(k, rows=4000):
    return RNG.random((rows, k))


def test_parts_have_the_areas_aspects_and_places_of_the_definition():
    own_B2 = np.tile((400, 500), (4000, 1))
    top_B, left_B, height_B, width_B = boxes(own_B2, uniform(22), 0.08).T.astype(float)
    assert (top_B >= 0).all()
    assert (left_B >= 0).all()
    assert (top_B + height_B <= 400).all()
    assert (left_B + width_B <= 500).all()
    area_B, aspect_B = height_B * width_B / (400 * 500), width_B / height_B
    assert 0.078 < area_B.min() < 0.1
    assert 0.74 < aspect_B.min() < 0.76
    assert 1.32 < aspect_B.max() < 1.345
    # Nothing of up to 3/5 of the area is too large: there area is uniform, and aspect log-uniform.
    small_B = area_B < 0.58
    np.testing.assert_allclose(np.quantile(area_B[small_B], 0.5), 0.33, atol=0.02)
    assert abs(np.log(aspect_B[small_B]).mean()) < 0.02
    # The place is uniform in what room there is.
    for first_B, side_B, whole in ((top_B, height_B, 400), (left_B, width_B, 500)):
        np.testing.assert_allclose((first_B / np.maximum(whole - side_B, 1)).mean(), 0.5, atol=0.03)


@pytest.mark.parametrize('own', [(10, 400), (400, 10), (1, 1), (3, 4)])
def test_what_never_fits_is_cut_from_the_centre(own):
    box_B4 = boxes(np.tile(own, (500, 1)), uniform(22, 500), 0.9)
    assert (box_B4[:, 2:] >= 1).all()
    assert (box_B4[:, :2] + box_B4[:, 2:] <= own).all()
    if max(own) == 400:
        height, width = (10, 13) if own[0] == 10 else (13, 10)
        centre = [(own[0] - height) // 2, (own[1] - width) // 2, height, width]
        np.testing.assert_array_equal(box_B4, np.tile(centre, (500, 1)))


def test_the_whole_image_at_its_own_size_is_itself():
    image = RNG.integers(0, 256, (7, 12, 12, 3), np.uint8)
    # A least area of 1 leaves one square box.
    draws = np.full((7, 22), 0.5)
    out = RandomCrop((12, 12), 1.0)({'image': image, 'label': 3}, lambda k: draws[:, :k])
    np.testing.assert_array_equal(out['image'], image)
    assert out['label'] == 3
    part = RandomCrop((12, 12), 0.3)({'image': image}, lambda k: draws[:, :k])
    assert (part['image'] != image).any((1, 2, 3)).all()


@pytest.mark.parametrize('channels', [1, 3])
def test_encoded_images_are_cropped_like_arrays(channels):
    rng = np.random.default_rng(1)
    shape = (40, 50) if channels == 1 else (40, 50, 3)
    arrays = rng.integers(0, 256, (5, *shape), np.uint8)
    encoded = np.empty(5, object)
    for row, array in enumerate(arrays):
        file = io.BytesIO()
        Image.fromarray(array).save(file, 'png')
        encoded[row] = Encoded(file.getvalue(), channels=channels, name='row')
    draws = rng.random((5, 22))
    crop = RandomCrop((8, 6))
    expected = crop({'image': arrays.reshape(5, 40, 50, channels)}, lambda k: draws[:, :k])['image']
    found = crop({'image': encoded}, lambda k: draws[:, :k])['image']
    assert found.shape == (5, 8, 6, channels)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


def test_a_crop_shows_what_its_box_holds():
    ramp = np.tile(np.arange(200, dtype=np.uint8), (3, 100, 1))[..., None]
    draws = RNG.random((3, 22))
    out = RandomCrop((20, 20))({'image': ramp}, lambda k: draws[:, :k])['image']
    box_B4 = boxes(np.tile((100, 200), (3, 1)), draws, 0.08)
    for row, (_, left, _, width) in enumerate(box_B4):
        middle = left + width * (np.arange(20) + 0.5) / 20 - 0.5
        # Antialiasing leans inwards at the edges alone.
        np.testing.assert_allclose(out[row, 7, 2:-2, 0], middle[2:-2], atol=1.01)
