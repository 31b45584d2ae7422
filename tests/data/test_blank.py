"""Data of zeros: as many tokens and classes as are asked for, from nowhere."""

import numpy as np
import pytest

from bigjax.data.images import open_images
from bigjax.data.text import open_language
from bigjax.run import UsageError


def test_text_has_the_vocabulary_that_is_asked_for(tmp_path):
    folder = tmp_path / 'data'
    data = open_language('blank', seq=7, data_dir=str(folder), tokenizer='bpe', vocab=100_000)
    assert data.tokenizer.vocab_size == len(data.tokenizer.token_bytes) == 100_000
    tokens_NT = data.train.take(np.arange(3))['tokens']
    assert tokens_NT.shape == (3, 8)
    assert not tokens_NT.any()
    assert len(data.train) == len(data.validation) == 64
    assert data.tokenizer.decode(data.tokenizer.encode('abc')) == '???'
    assert not folder.exists()


def test_bytes_are_256_whatever_the_vocabulary():
    data = open_language('blank', seq=7, data_dir='', tokenizer='bytes', vocab=100_000)
    assert data.tokenizer.vocab_size == 256


def test_images_are_black():
    data = open_images('blank:1000', data_dir='')
    assert data.image_shape == (224, 224, 3)
    assert data.num_classes == 1000
    rows = data.train.take(np.arange(2))
    assert rows['image'].shape == (2, 224, 224, 3)
    assert rows['image'].dtype == np.uint8
    assert not rows['label'].any()


@pytest.mark.parametrize('classes', ['0', 'ten'])
def test_a_number_of_classes_is_needed(classes):
    with pytest.raises(UsageError) as error:
        open_images(f'blank:{classes}', data_dir='')
    assert str(error.value) == (
        f'--dataset=blank:{classes}: must end in a number of classes; try --dataset=blank:1000'
    )
