import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from bigjax.data import randaugment
from bigjax.data.decode import pillow
from bigjax.data.randaugment import CHANGES, RandAugment

RNG = np.random.default_rng(0)
NAMES = [change.__name__ for change in CHANGES]
ALWAYS = ('autocontrast', 'equalize')


def photo(channels, side=24):
    """A smooth image that does not use all levels."""
    small = RNG.integers(30, 220, (4, 4, 3), np.uint8)
    image = Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image)[..., :channels].copy()


def changed(name, image, strength):
    out = getattr(randaugment, name)(pillow(image), strength)
    return np.asarray(out).reshape(image.shape)


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('name', NAMES)
def test_strength_0_changes_nothing_and_strength_1_does(name, channels):
    image = photo(channels)
    if name not in ALWAYS:
        np.testing.assert_array_equal(changed(name, image, 0.0), image)
        np.testing.assert_array_equal(changed(name, image, -0.0), image)
    same = name == 'identity' or (name == 'color' and channels == 1)
    assert (changed(name, image, 1.0) == image).all() == same
    assert (changed(name, image, -1.0) == image).all() == same


@pytest.mark.parametrize('channels', [1, 3])
def test_levels_are_those_of_pillow(channels):
    for image in (photo(channels), np.full((5, 6, channels), 7, np.uint8)):
        whole = pillow(image)
        for name, expected, close in (
            ('autocontrast', ImageOps.autocontrast(whole), 1),
            ('equalize', ImageOps.equalize(whole), 0),
            ('solarize', ImageOps.solarize(whole, 128), 0),
            ('posterize', ImageOps.posterize(whole, 6), 0),
            ('brightness', ImageEnhance.Brightness(whole).enhance(1.45), 1),
            ('contrast', ImageEnhance.Contrast(whole).enhance(1.45), 1),
            ('color', ImageEnhance.Color(whole).enhance(1.45), 1),
            ('sharpness', ImageEnhance.Sharpness(whole).enhance(1.45), 1),
        ):
            expected = np.asarray(expected).reshape(image.shape).astype(int)
            found = changed(name, image, 0.5).astype(int)
            np.testing.assert_allclose(found, expected, atol=close, err_msg=name)


def test_geometry_goes_as_far_as_the_paper_says():
    image = np.zeros((101, 101, 1), np.uint8)
    image[50, 50] = 255
    image[50, 90] = 200
    for name, centre, far in (
        ('translate_x', (50, 5), (50, 45)),  # 150 / 331 of 101 pixels are 46.
        ('translate_y', (4, 50), (4, 90)),
        ('shear_x', (50, 50), (50, 90)),
        ('shear_y', (50, 50), (38, 90)),  # 0.3 of 40 pixels
    ):
        out = changed(name, image, 1.0)[..., 0]
        for (row, column), value in ((centre, 255), (far, 200)):
            near = out[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            assert near.max() == value, name
    turned = changed('rotate', image, 1.0)[..., 0]
    row, column = np.argwhere(turned == 200)[0]
    np.testing.assert_allclose(np.hypot(row - 50, column - 50), 40, atol=1)
    np.testing.assert_allclose(abs(np.degrees(np.arctan2(row - 50, column - 50))), 30, atol=1.5)


def test_every_change_is_drawn_equally_often_in_either_direction(monkeypatch):
    drawn = []

    def spy(number):
        return lambda image, strength: drawn.append((number, strength)) or image

    monkeypatch.setattr(randaugment, 'CHANGES', tuple(map(spy, range(14))))
    images = {'image': np.zeros((1400, 2, 2, 1), np.uint8), 'label': 'kept'}
    out = RandAugment(3, 4.0)(images, lambda k: RNG.random((1400, k)))
    assert out['label'] == 'kept'
    assert len(drawn) == 3 * 1400
    count = np.bincount([number for number, _ in drawn], minlength=14)
    assert (abs(count - 300) < 5 * np.sqrt(300)).all()
    assert {strength for _, strength in drawn} == {0.4, -0.4}
    assert abs(sum(strength > 0 for _, strength in drawn) - 2100) < 5 * np.sqrt(1050)


@pytest.mark.parametrize('channels', [1, 3])
def test_a_batch_keeps_shape_and_type_and_its_input(channels):
    image = np.stack([photo(channels, 9) for _ in range(60)])
    before = image.copy()
    out = RandAugment(2, 10.0)({'image': image}, lambda k: RNG.random((60, k)))['image']
    assert (out.shape, out.dtype) == (image.shape, np.uint8)
    np.testing.assert_array_equal(image, before)
    assert (out != image).any((1, 2, 3)).mean() > 0.7
