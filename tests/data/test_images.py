import gzip
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bigjax.data.framed import Frame
from bigjax.data.images import open_images
from bigjax.experiment import UsageError

FASHION = Path('/usr/share/datasets/fashion-mnist')


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f'>{array.ndim}I', *array.shape)
    data = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)


@pytest.fixture
def mnist(tmp_path):
    rng = np.random.default_rng(0)
    for name, size, suffix in (('train', 30, '.gz'), ('t10k', 10, '')):
        images = rng.integers(0, 256, (size, 5, 4))
        write_idx(tmp_path / f'{name}-images-idx3-ubyte{suffix}', images)
        write_idx(tmp_path / f'{name}-labels-idx1-ubyte{suffix}', np.arange(size) % 10)
    return tmp_path


def write_images(folder, count=10, size=(6, 5), mode='RGB'):
    for label, name in enumerate(('cat', 'dog')):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            shade = 100 * label + number
            colour = shade if mode == 'L' else (shade, 0, 0)
            Image.new(mode, size, colour).save(folder / name / f'{number}.png')
    return folder


def test_digits(tmp_path):
    data = open_images('digits', data_dir=str(tmp_path))
    assert data.image_shape == (8, 8, 1)
    assert data.num_classes == 10
    assert data.card.sizes == {'train': 1438, 'test': 359}
    batch = data.train.take(np.arange(1438))
    assert batch['image'].dtype == np.uint8
    assert batch['image'].max() == 255
    assert batch['label'].dtype == np.int32
    mean, std = data.statistics
    normal = (batch['image'] - mean) / std
    assert normal.dtype == np.float32
    np.testing.assert_allclose([normal.mean(), normal.std()], [0, 1], atol=1e-5)


def test_idx(mnist):
    data = open_images(f'idx:{mnist}', data_dir=str(mnist / 'data'))
    assert data.image_shape == (5, 4, 1)
    assert data.num_classes == 10
    batch = data.test.take(np.array([9, 3]))
    raw = (mnist / 't10k-images-idx3-ubyte').read_bytes()[16:]
    expected = np.frombuffer(raw, np.uint8).reshape(10, 5, 4, 1)[[9, 3]]
    np.testing.assert_array_equal(batch['image'], expected)
    assert batch['label'].tolist() == [9, 3]
    copy = pickle.loads(pickle.dumps(data.test))
    np.testing.assert_array_equal(copy.take(np.array([9, 3]))['image'], expected)
    assert len(pickle.dumps(data.train)) < 1000


@pytest.mark.skipif(not FASHION.is_dir(), reason='needs the Debian package dataset-fashion-mnist')
def test_fashion_mnist(tmp_path):
    data = open_images(f'idx:{FASHION}', data_dir=str(tmp_path))
    assert data.card.sizes == {'train': 60000, 'test': 10000}
    labels = data.test.take(np.arange(10000))['label']
    np.testing.assert_array_equal(np.bincount(labels), np.full(10, 1000))
    mean, std = data.statistics
    np.testing.assert_allclose([mean[0] / 255, std[0] / 255], [0.286, 0.353], atol=0.002)


def test_damaged_idx(mnist):
    def message():
        with pytest.raises(UsageError) as caught:
            open_images(f'idx:{mnist}', data_dir=str(mnist / 'data'))
        return str(caught.value)

    labels = mnist / 't10k-labels-idx1-ubyte'
    whole = labels.read_bytes()
    labels.write_bytes(whole[:-3])
    assert message() == (
        f'{labels}: truncated or damaged: 15 bytes where its header promises 18; record 7 of 10 '
        'is the first that is not whole'
    )
    labels.write_bytes(b'<html>')
    assert message() == f"{labels}: not an idx file of bytes (it starts with '3c68746d')"
    write_idx(labels, np.arange(9))
    assert message() == f'--dataset=idx:{mnist}: 10 test images but 9 labels'
    images = mnist / 'train-images-idx3-ubyte.gz'
    images.write_bytes(images.read_bytes()[:-20])
    assert message().startswith(f'{images}: damaged gzip file (')
    images.unlink()
    assert message() == (
        f'--dataset=idx:{mnist}: train-images-idx3-ubyte (or train-images-idx3-ubyte.gz) is not '
        'there; name a folder that holds the four files of the MNIST family, such as '
        '/usr/share/datasets/fashion-mnist (Debian: apt-get install dataset-fashion-mnist)'
    )


@pytest.mark.parametrize('cached', [2**30, 0])
def test_folders(tmp_path, monkeypatch, cached):
    monkeypatch.setattr('bigjax.data.framed.CACHED_BYTES', cached)
    folder = write_images(tmp_path / 'pets')
    data = open_images(f'images:{folder}', data_dir=str(tmp_path / 'data'))
    assert data.class_names == ('cat', 'dog')
    assert data.image_shape == (5, 6, 3)
    assert data.card.sizes == {'train': 16, 'test': 4}
    seen = []
    for records in (data.train, data.test):
        batch = records.take(np.arange(len(records)))
        assert (batch['image'][..., 0] // 100 == batch['label'][:, None, None]).all()
        seen += batch['image'][:, 0, 0, 0].tolist()
    assert sorted(seen) == [*range(10), *range(100, 110)]
    assert (tmp_path / 'data').exists() == bool(cached)


def test_folders_with_splits_resized_and_grey(tmp_path):
    write_images(tmp_path / 'pets/train', mode='L', size=(9, 7))
    write_images(tmp_path / 'pets/val', mode='L', count=3)
    data_dir, frame = str(tmp_path / 'data'), Frame(size=4)
    data = open_images(f'images:{tmp_path}/pets', data_dir=data_dir, frame=frame)
    assert data.image_shape == (4, 4, 1)
    assert data.card.sizes == {'train': 20, 'test': 6}


def test_folder_errors(tmp_path):
    folder, data_dir = tmp_path / 'pets', str(tmp_path / 'data')

    def message():
        with pytest.raises(UsageError) as caught:
            open_images(f'images:{folder}', data_dir=data_dir)
        return str(caught.value)

    assert message() == f'--dataset=images:{folder}: no such folder'
    folder.mkdir()
    assert message() == (
        f'--dataset=images:{folder}: no images for train; it must hold a folder for each class '
        'with at least five images, or train/CLASS and test/CLASS'
    )
    write_images(folder)
    damaged = folder / 'dog/3.png'
    damaged.write_bytes(damaged.read_bytes()[:40])
    assert message().startswith(f'--dataset=images:{folder}: dog/3.png is not a readable image (')
    Image.new('RGB', (20, 20)).save(damaged)
    assert message() == (
        f'--dataset=images:{folder}: dog/3.png is 20 x 20 where the first image is 6 x 5; '
        'try --image_size=5'
    )
    open_images(f'images:{folder}', data_dir=data_dir, frame=Frame(size=5))


def test_unknown_source(tmp_path):
    message = (
        '--dataset=cifar: no such source of images; there are digits, tfds:NAME, idx:DIR and '
        'images:DIR; try --dataset=digits'
    )
    with pytest.raises(UsageError, match=f'^{re.escape(message)}$'):
        open_images('cifar', data_dir=str(tmp_path))
