import io
import pickle
import re

import numpy as np
import pytest
from PIL import Image, ImageOps

from bigjax.data.crops import RandomCrop
from bigjax.data.decode import Encoded
from bigjax.data.framed import Frame
from bigjax.data.images import open_images
from bigjax.data.pipeline import train_batches
from bigjax.experiment import UsageError

SIZES = [(40, 30), (31, 47), (64, 64), (90, 35), (50, 50), (33, 80)]


def picture(size, seed):
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path):
    """Folders of photographs of many sizes, the held-out ones of the same kind."""
    for split, count in (('train', 6), ('val', 3)):
        for label, name in enumerate(('cat', 'dog')):
            (tmp_path / 'pets' / split / name).mkdir(parents=True)
            for number in range(count):
                file = tmp_path / 'pets' / split / name / f'{number}.png'
                picture(SIZES[number], 10 * label + number).save(file)
    return tmp_path / 'pets'


def encoded(image, form, channels=3):
    file = io.BytesIO()
    image.save(file, form, quality=95)
    return Encoded(file.getvalue(), channels=channels, name='picture')


@pytest.mark.parametrize('size', SIZES)
def test_the_centre_is_cut_as_pillow_fits(size):
    image = picture(size, 1)
    expected = ImageOps.fit(image, (12, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(encoded(image, 'png').centre((16, 12)), np.asarray(expected))
    # Half of the side, in the middle.
    side = min(size)
    half = encoded(image.resize((side, side)), 'png').centre((8, 8), 0.5)
    whole = encoded(image.resize((side, side)), 'png').centre((16, 16))
    assert abs(half.astype(int) - whole[4:12, 4:12]).mean() < 2


@pytest.mark.parametrize('size', [(800, 600), (600, 800)])
def test_a_large_jpeg_is_decoded_at_a_fraction_and_looks_the_same(size):
    image = picture(size, 2)
    small = encoded(image, 'jpeg')
    found = small.centre((36, 36))
    # An eighth: still more than twice the 36 asked for.
    assert small.image.size == (size[0] // 8, size[1] // 8)
    expected = np.asarray(ImageOps.fit(image, (36, 36), Image.Resampling.BILINEAR))
    assert abs(found.astype(int) - expected).mean() < 1.5


@pytest.mark.parametrize('channels', [1, 3])
def test_folders_of_all_sizes_are_read_late_and_cropped(photos, tmp_path, channels):
    frame = Frame(size=16, channels=channels, share=0.875, whole=True)
    data = open_images(f'images:{photos}', data_dir=str(tmp_path / 'data'), frame=frame)
    assert data.image_shape == (16, 16, channels)
    mean, std = data.statistics
    assert mean.shape == std.shape == (channels,)
    batches = [
        train_batches(
            pickle.loads(pickle.dumps(data.train)),
            batch=12,
            seed=0,
            augment=RandomCrop((16, 16)),
            process_index=i,
            process_count=count,
        )[3]
        for i, count in ((0, 1), (0, 2), (1, 2))
    ]
    assert batches[0]['image'].shape == (12, 16, 16, channels)
    assert batches[0]['image'].dtype == np.uint8
    for name, array in batches[0].items():
        np.testing.assert_array_equal(array, np.concatenate([b[name] for b in batches[1:]]))
    test = data.test.take(np.arange(6))
    assert test['image'].shape == (6, 16, 16, channels)
    assert test['label'].tolist() == [0, 0, 0, 1, 1, 1]
    expected = encoded(picture(SIZES[1], 11), 'png', channels).centre((16, 16), 0.875)
    np.testing.assert_array_equal(test['image'][4], expected)


def test_the_cache_tells_frames_apart(photos, tmp_path):
    found = [
        open_images(f'images:{photos}', data_dir=str(tmp_path / 'data'), frame=frame).test.take(
            np.arange(6)
        )['image']
        for frame in (
            Frame(size=16),
            Frame(size=16, share=0.5),
            Frame(size=16, whole=True),
            Frame(size=8),
            Frame(size=16, channels=1),
        )
    ]
    assert (found[0] != found[1]).any()
    np.testing.assert_array_equal(found[0], found[2])
    assert [image.shape[1:] for image in found[3:]] == [(8, 8, 3), (16, 16, 1)]


def test_damage_is_named_when_it_is_found(photos, tmp_path):
    frame = Frame(size=16, whole=True)
    data = open_images(f'images:{photos}', data_dir=str(tmp_path / 'data'), frame=frame)
    file = photos / 'train/dog/2.png'
    file.write_bytes(file.read_bytes()[:-60])
    crop = RandomCrop((16, 16))
    message = (
        f'--dataset=images:{photos}: train/dog/2.png is not a readable image (OSError); replace or '
        'remove it'
    )
    with pytest.raises(UsageError, match=f'^{re.escape(message)}$'):
        crop(data.train.take(np.arange(12)), lambda k: np.full((12, k), 0.5))
    file.unlink()
    with pytest.raises(UsageError, match=r'2\.png is not a readable image \(FileNotFoundError\)'):
        data.train.take(np.arange(12))


def test_arrays_are_framed_and_coloured(tmp_path):
    plain = open_images('digits', data_dir=str(tmp_path))
    data = open_images('digits', data_dir=str(tmp_path), frame=Frame(size=12, channels=3))
    assert data.image_shape == (12, 12, 3)
    assert len(data.train) == len(plain.train)
    image = data.train.take(np.arange(3))['image']
    assert image.shape == (3, 12, 12, 3)
    assert (image == image[..., :1]).all()
    assert data.statistics[0].shape == (3,)
    np.testing.assert_allclose(data.statistics[0], plain.statistics[0][0], atol=3)
    whole = open_images('digits', data_dir=str(tmp_path), frame=Frame(size=12, whole=True))
    assert whole.train.take(np.arange(3))['image'].shape == (3, 8, 8, 1)
    assert whole.test.take(np.arange(3))['image'].shape == (3, 12, 12, 1)
    same = open_images('digits', data_dir=str(tmp_path), frame=Frame(size=8, channels=1))
    assert type(same.train) is type(plain.train)
