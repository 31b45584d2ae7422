import contextlib
import io
import pickle
import re
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from bigjax.data.classification import open_classification
from bigjax.data.crops import RandomCrop
from bigjax.data.framed import Frame
from bigjax.data.images import open_images
from bigjax.data.text import open_language
from bigjax.experiment import UsageError

with tfds.core.registered.skip_registration():

    class ToyPictures(tfds.core.GeneratorBasedBuilder):
        """Grey squares with a caption, labelled by how bright they are."""

        VERSION = tfds.core.Version('1.0.0')

        def _info(self):
            return self.dataset_info_from_configs(
                description='Grey squares.',
                license='CC0',
                features=tfds.features.FeaturesDict(
                    {
                        'image': tfds.features.Image(shape=(5, 4, 1)),
                        'label': tfds.features.ClassLabel(names=['dark', 'bright']),
                        'text': tfds.features.Text(),
                    }
                ),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {'train': self._generate_examples(40), 'test': self._generate_examples(8)}

        def _generate_examples(self, count):
            for n in range(count):
                # Only images that are already encoded can be written without TensorFlow.
                image = io.BytesIO()
                Image.new('L', (4, 5), 5 * n).save(image, 'png')
                image.seek(0)
                yield n, {'image': image, 'label': int(n >= count / 2), 'text': f'square {n}'}

    class ToyContest(ToyPictures):
        """As ImageNet: photographs of many sizes, and a test split whose labels nobody knows."""

        def _info(self):
            features = {
                'image': tfds.features.Image(encoding_format='jpeg'),
                'label': tfds.features.ClassLabel(names=['dark', 'bright']),
            }
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            sizes = {'train': 12, 'validation': 5, 'test': 3}
            return {split: self._generate_examples(split, size) for split, size in sizes.items()}

        def _generate_examples(self, split, count):
            for n in range(count):
                image = io.BytesIO()
                Image.new('RGB', (30 + n, 20 + 2 * n), (20 * n,) * 3).save(image, 'jpeg')
                image.seek(0)
                yield n, {'image': image, 'label': -1 if split == 'test' else n % 2}


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp('tfds'))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for builder in (ToyPictures, ToyContest):
            builder(data_dir=folder).download_and_prepare(file_format='array_record')
    return folder


@pytest.mark.parametrize('cached', [2**30, 0])
def test_images(data_dir, monkeypatch, cached):
    monkeypatch.setattr('bigjax.data.framed.CACHED_BYTES', cached)
    data = open_images('tfds:toy_pictures', data_dir=data_dir)
    assert data.class_names == ('dark', 'bright')
    assert data.image_shape == (5, 4, 1)
    assert data.card.sizes == {'train': 40, 'test': 8}
    assert data.card.license == 'CC0'
    batch = data.train.take(np.array([30, 2]))
    assert batch['image'][:, 0, 0, 0].tolist() == [150, 10]
    assert batch['label'].tolist() == [1, 0]
    small = open_images('tfds:toy_pictures', data_dir=data_dir, frame=Frame(size=3))
    assert small.test.take(np.array([1]))['image'].shape == (1, 3, 3, 1)
    assert 'tensorflow' not in sys.modules


def test_photographs_of_many_sizes_and_unknown_test_labels(data_dir):
    frame = Frame(size=16, whole=True)
    data = open_images('tfds:toy_contest', data_dir=data_dir, frame=frame)
    assert data.card.sizes == {'train': 12, 'test': 5}
    assert data.image_shape == (16, 16, 3)
    batch = pickle.loads(pickle.dumps(data.train)).take(np.array([7, 2]))
    assert [image.size for image in batch['image']] == [(34, 37), (24, 32)]
    cropped = RandomCrop((16, 16))(batch, lambda k: np.full((2, k), 0.3))
    np.testing.assert_allclose(cropped['image'].mean((1, 2, 3)), [140, 40], atol=1)
    assert batch['label'].tolist() == [1, 0]
    test = data.test.take(np.arange(5))
    np.testing.assert_allclose(test['image'].mean((1, 2, 3)), 20 * np.arange(5), atol=1)
    message = r'record 1 of train is 31 x 22 where the first image is 30 x 20; try --image_size=20$'
    with pytest.raises(UsageError, match=message):
        open_images('tfds:toy_contest', data_dir=data_dir)
    assert 'tensorflow' not in sys.modules


def test_texts(data_dir):
    data = open_classification('tfds:toy_pictures', seq=16, data_dir=data_dir)
    batch = data.test.take(np.array([5]))
    assert data.tokenizer.decode(batch['tokens'][0]) == 'square 5'
    assert data.class_names[batch['label'][0]] == 'bright'
    language = open_language('tfds:toy_pictures', seq=16, data_dir=data_dir)
    text = language.tokenizer.decode(language.train.tokens[:])
    assert text == ''.join(f'square {n}\n\n' for n in range(40))


def test_absent_set_says_what_to_run(tmp_path):
    message = (
        f'--dataset=tfds:fashion_mnist: not prepared under --data_dir={tmp_path}; on a machine '
        'with a network, and TensorFlow if the set asks for it, run\n'
        "  python -c \"import tensorflow_datasets as tfds; tfds.builder('fashion_mnist', "
        "data_dir='DIR', file_format='array_record').download_and_prepare()\"\n"
        f'and copy DIR/fashion_mnist to {tmp_path}/fashion_mnist'
    )
    with pytest.raises(UsageError, match=f'^{re.escape(message)}$'):
        open_images('tfds:fashion_mnist', data_dir=str(tmp_path))


def test_unknown_set(tmp_path):
    message = (
        '--dataset=tfds:fashoin_mnist: TFDS has no set of this name and none is prepared under '
        f'--data_dir={tmp_path}; its sets are listed on tensorflow.org/datasets/catalog'
    )
    with pytest.raises(UsageError, match=f'^{re.escape(message)}$'):
        open_images('tfds:fashoin_mnist', data_dir=str(tmp_path))
