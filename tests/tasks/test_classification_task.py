"""Mixed images, auxiliary heads and top-5 accuracy; the rest is in tests/test_task.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bigjax import losses, sharding
from bigjax.tasks.classification import classification, mixed, standardize

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (8, 6, 5, 2), np.uint8)
LABEL = np.array([0, 1, 2, 3, 0, 1, 2, 3], np.int32)
SHARE = np.array([1.0, 0.0, 0.25, 0.7, 1.0, 1.0, 1.0, 0.5], np.float32)
BOX = np.zeros((8, 4), np.int32)
BOX[4:7] = [(1, 0, 4, 3), (0, 0, 6, 5), (5, 4, 6, 5)]
MIXED = {'image': IMAGE, 'label': LABEL, 'mix_share': SHARE, 'mix_box': BOX}
PLAIN = {'image': IMAGE, 'label': LABEL}


class Heads(nn.Module):
    """Linear classifiers of the mean pixel: one, and some that only training sees."""

    classes: int = 4
    aux: int = 0

    @nn.compact
    def __call__(self, x_BHWC, *, train):
        x_BC = x_BHWC.mean((1, 2))
        main, *aux = (nn.Dense(self.classes, name=f'head_{i}')(x_BC) for i in range(1 + self.aux))
        return (main, *aux) if aux and train else main


def task(classes=4, aux=0, **options):
    return classification(
        Heads(classes, aux),
        inputs='image',
        example=jax.ShapeDtypeStruct(IMAGE.shape[1:], jnp.uint8),
        class_names=tuple(map(str, range(classes))),
        forward_flops=1,
        unit='images',
        preprocess=standardize(np.full(2, 127.5, np.float32), np.full(2, 50, np.float32)),
        **options,
    )


def run(task, batch, train=True):
    variables = jax.jit(task.init)(jax.random.key(0))
    params = variables.pop('params')
    loss = jax.jit(task.loss, static_argnums=4)
    value, (_, metrics) = loss(params, variables, batch, jax.random.key(1), train)
    return (
        value,
        {name: pair[0] / pair[1] for name, pair in metrics.items()},
        jax.device_get(params),
    )


def expected_mix():
    """Pixel by pixel in float64."""
    out, own = np.empty(IMAGE.shape), np.empty(8)
    for b in range(8):
        share = np.full((6, 5, 1), SHARE[b], np.float64)
        top, left, bottom, right = BOX[b]
        share[top:bottom, left:right] = 0
        out[b] = share * IMAGE[b] + (1 - share) * IMAGE[b - 1]
        own[b] = share.mean()
    return out, own


def test_images_are_mixed_pixel_by_pixel():
    image, own = jax.jit(mixed)(IMAGE, SHARE, BOX)
    expected, share = expected_mix()
    assert image.dtype == jnp.float32
    np.testing.assert_allclose(image, expected, atol=1e-4)
    np.testing.assert_allclose(own, share, atol=1e-6)


def test_mixing_is_that_of_the_whole_batch_on_any_number_of_devices():
    placed = sharding.batch_sharding(sharding.make_mesh('data=8'))
    arrays = [jax.device_put(x, placed) for x in (IMAGE, SHARE, BOX)]
    for found, expected in zip(jax.jit(mixed)(*arrays), expected_mix(), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_the_loss_is_that_of_both_labels_by_their_shares(smoothing):
    value, metrics, params = run(task(label_smoothing=smoothing), MIXED)
    image, own = expected_mix()
    head = params['head_0']
    logits = ((image - 127.5) / 50).mean((1, 2)) @ head['kernel'] + head['bias']
    other = np.roll(LABEL, 1)
    target = own[:, None] * np.eye(4)[LABEL] + (1 - own[:, None]) * np.eye(4)[other]
    target = (1 - smoothing) * target + smoothing / 4
    expected = -(target * np.asarray(jax.nn.log_softmax(logits))).sum(1).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    guess = np.argmax(logits, 1)
    accuracy = np.mean(own * (guess == LABEL) + (1 - own) * (guess == other))
    np.testing.assert_allclose(metrics['accuracy'], accuracy, rtol=1e-6)


def test_images_mixed_with_nothing_are_themselves():
    nothing = {**PLAIN, 'mix_share': np.ones(8, np.float32), 'mix_box': np.zeros((8, 4), np.int32)}
    value, metrics, _ = run(task(), nothing)
    plain, plain_metrics, _ = run(task(), PLAIN)
    assert value == plain
    assert metrics == plain_metrics


def test_auxiliary_heads_join_the_loss_of_training_only():
    weights = (0.3, 0.5)
    value, metrics, params = run(task(aux=2, aux_weights=weights), PLAIN)
    x = ((IMAGE - 127.5) / 50).mean((1, 2)).astype(np.float32)
    costs = [
        losses.cross_entropy(x @ params[f'head_{i}']['kernel'], jnp.asarray(LABEL)).mean()
        for i in range(3)
    ]
    np.testing.assert_allclose(value, costs[0] + 0.3 * costs[1] + 0.5 * costs[2], rtol=1e-5)
    assert metrics['loss'] == value
    evaluated, metrics, _ = run(task(aux=2, aux_weights=weights), PLAIN, train=False)
    np.testing.assert_allclose(evaluated, costs[0], rtol=1e-5)
    assert metrics['confusion'].sum() == 8
    with pytest.raises(ValueError, match='zip'):
        run(task(aux=2, aux_weights=(0.3,)), PLAIN)


def test_top_5_accuracy_is_of_many_classes_only():
    assert 'top_5_accuracy' not in run(task(100), PLAIN, train=False)[1]
    many = task(101)
    x = ((IMAGE - 127.5) / 50).mean((1, 2))
    head = {'kernel': RNG.normal(size=(2, 101)).astype(np.float32), 'bias': np.zeros(101, 'f4')}
    # Row r has as its label what the model finds the (r + 1)th likeliest.
    label = np.argsort(-(x @ head['kernel']), 1)[np.arange(8), np.arange(8)].astype(np.int32)
    batch = {**PLAIN, 'label': label}
    loss = jax.jit(many.loss, static_argnums=4)
    _, (_, metrics) = loss({'head_0': head}, {}, batch, jax.random.key(0), False)
    assert metrics['top_5_accuracy'] == (5, 8)
    assert metrics['accuracy'] == (1, 8)
