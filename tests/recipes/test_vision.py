import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bigjax import experiment as experiments
from bigjax import identity as identities
from bigjax import train
from bigjax.data.pipeline import train_batches
from bigjax.experiment import Run, UsageError
from bigjax.metrics import read_metrics
from bigjax.optimizers import Optim
from bigjax.recipes.vision import Images, image_classification

EVERYTHING = {
    'image_size': 12,
    'channels': 3,
    'flip': True,
    'shift': 1,
    'crop': 0.3,
    'randaugment': 2,
    'erase': 0.5,
    'mixup': 0.2,
    'cutmix': 1.0,
}


@pytest.mark.parametrize(
    ('knobs', 'message'),
    [
        ({'image_size': -1}, '--image_size=-1: must not be negative; try --image_size=0'),
        ({'channels': 2}, '--channels=2: must be 0, 1 or 3; try --channels=3'),
        (
            {'eval_crop': 0.0},
            '--eval_crop=0.0: must be above 0 and at most 1; try --eval_crop=0.875',
        ),
        ({'crop': 1.5}, '--crop=1.5: must be between 0 and 1; try --crop=0.08'),
        ({'magnitude': 11.0}, '--magnitude=11.0: must be between 0 and 10; try --magnitude=5'),
        ({'mixup': -0.1}, '--mixup=-0.1: must be at least 0 and finite; try --mixup=0.2'),
        (
            {'num_classes': 7},
            '--num_classes=7: --dataset=digits has 10 classes; try --num_classes=10',
        ),
        (
            {'normalize': 'imagenet'},
            '--normalize=imagenet: is for three channels, and --dataset=digits has 1; '
            'try --channels=3',
        ),
    ],
)
def test_knobs_that_do_not_fit(knobs, message, tmp_path):
    with pytest.raises(UsageError, match=f'^{re.escape(message)}$'):
        Images(**knobs).open(str(tmp_path))


def test_a_model_may_have_more_classes_than_the_data(tmp_path):
    data = Images(num_classes=12).open(str(tmp_path))
    assert data.num_classes == 12
    assert data.class_names[8:] == ('8', '9', 'class 10', 'class 11')


@pytest.mark.parametrize('hosts', [2, 3, 6])
def test_hosts_together_have_the_batch_of_one_whatever_is_done_to_it(hosts, tmp_path):
    images = Images(**EVERYTHING)
    data = images.open(str(tmp_path))
    # Pickled, as it comes to a process that reads.
    augment = pickle.loads(pickle.dumps(images.augment(data.image_shape[:2])))

    def batch(host, count):
        return train_batches(
            data.train, batch=12, seed=1, augment=augment, process_index=host, process_count=count
        )[5]

    whole, parts = batch(0, 1), [batch(host, hosts) for host in range(hosts)]
    assert set(whole) == {'image', 'label', 'mix_share', 'mix_box'}
    assert whole['image'].shape == (12, 12, 12, 3)
    assert whole['image'].dtype == np.uint8
    for name, array in whole.items():
        np.testing.assert_array_equal(array, np.concatenate([part[name] for part in parts]))


def test_nothing_is_done_to_images_by_default(tmp_path):
    data = Images().open(str(tmp_path))
    examples = data.train.take(np.arange(3))
    assert Images().augment((8, 8))(examples, None) is examples


class Mean(nn.Module):
    """The mean of the input as the first of two logits; what the input was, to be looked at."""

    @nn.compact
    def __call__(self, x_BHWC, *, train):
        mean_B = x_BHWC.mean((1, 2, 3)) + self.param('bias', nn.initializers.zeros_init(), ())
        return jnp.stack([mean_B, *[jnp.zeros_like(mean_B)] * 9], 1)


@pytest.mark.parametrize(
    ('normalize', 'expected'),
    [('half', -1.0), ('imagenet', -np.mean([0.485 / 0.229, 0.456 / 0.224, 0.406 / 0.225]))],
)
def test_normalization_is_what_was_asked_for(normalize, expected, tmp_path):
    images = Images(normalize=normalize, channels=3)
    experiment = image_classification(
        Mean(),
        images.open(str(tmp_path)),
        images=images,
        run=Run(steps=1, batch=1),
        optim=Optim(warmup=0),
        rules=((r'bias', ()),),
        forward_flops=1,
    )
    black = {'image': np.zeros((1, 8, 8, 3), np.uint8), 'label': np.zeros(1, np.int32)}
    value, _ = experiment.task.loss({'bias': jnp.zeros(())}, {}, black, jax.random.key(0), False)
    np.testing.assert_allclose(value, np.log(1 + 9 * np.exp(-expected)), rtol=1e-5)


@pytest.mark.slow
def test_a_run_with_everything_on(tmp_path):
    knobs = {**EVERYTHING, 'hidden': 16, 'steps': 2, 'batch': 8, 'warmup': 0, 'log_every': 1}
    knobs |= {'data_dir': str(tmp_path / 'data'), 'num_classes': 101}
    function = experiments.find('cnn')
    experiment = experiments.build(function, knobs)
    outcome = train.train(experiment, identities.identity('cnn', function, knobs), tmp_path)
    assert outcome.step == 2
    found = outcome.scores['test']
    assert 0 <= found['accuracy'] <= found['top_5_accuracy'] <= 1
    for record in read_metrics(tmp_path / 'metrics.jsonl'):
        assert np.isfinite(record['loss'])
