"""AlexNet: published size and FLOPs, rules, the form for small images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrix_flops import matrix_flops
from model_variables import check_rules, drawn, shapes_of

from bigjax.models.alexnet import RULES, AlexNet, forward_flops


@pytest.fixture(scope='module')
def small():
    model = AlexNet(classes=3, width=4, hidden=8, small_stem=True)
    x = np.random.default_rng(0).standard_normal((4, 8, 8, 1), np.float32)
    return model, x, drawn(shapes_of(model, x.shape[1:]))


@pytest.mark.parametrize(('classes', 'count'), [(1000, 61_100_840), (10, 57_044_810)])
def test_parameter_count(classes, count):
    params = shapes_of(AlexNet(classes=classes), (224, 224, 3))['params']
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


@pytest.mark.parametrize('small_stem', [False, True])
def test_every_parameter_has_a_rule_of_its_rank(small_stem):
    params = shapes_of(AlexNet(classes=10, small_stem=small_stem), (64, 64, 3))['params']
    check_rules(params, RULES)


def test_flops_are_the_published_ones():
    # Multiply-adds in units of 10^9, as torchvision tells them.
    assert round(forward_flops((224, 224), 3, 1000) / 2e9, 3) == 0.714


@pytest.mark.parametrize(
    ('size', 'small_stem'), [((224, 224), False), ((28, 28), True), ((8, 9), True)]
)
def test_flops_follow_the_model(size, small_stem):
    shape = {'width': 8, 'hidden': 12, 'small_stem': small_stem}
    model = AlexNet(classes=5, **shape)
    apply = lambda v, x: model.apply(v, x, train=False)  # noqa: E731
    traced = matrix_flops(apply, shapes_of(model, (*size, 3)), jnp.zeros((1, *size, 3)))
    assert forward_flops(size, 3, 5, **shape) == traced


def test_dense_layers_of_the_published_form_read_6x6_whatever_the_image():
    for side in (63, 127, 224):
        params = shapes_of(AlexNet(classes=10, width=8, hidden=8), (side, side, 3))['params']
        assert params['hidden_0']['kernel'].shape == (6, 6, 32, 8)


def test_small_form_sees_every_pixel(small):
    model, x, variables = small
    gradient = jax.jit(jax.grad(lambda x: model.apply(variables, x, train=False).sum()))
    # With five test rows of noise, some pixel of a row that pooling left out would stay without.
    seen = np.abs(gradient(x)).sum((0, 3)) > 0
    assert seen.all()


def test_dropout_acts_in_training_only_and_rows_do_not_mix(small):
    model, x, variables = small

    @jax.jit(static_argnums=(2,))
    def logits(x, seed, train):
        return model.apply(variables, x, train=train, rngs={'dropout': jax.random.key(seed)})

    evaluated = logits(x, 0, False)
    assert (evaluated.shape, evaluated.dtype) == ((4, 3), jnp.float32)
    np.testing.assert_array_equal(evaluated, logits(x, 1, False))
    assert not np.array_equal(logits(x, 0, True), logits(x, 1, True))
    np.testing.assert_allclose(
        logits(np.concatenate([x[:2], 0 * x[2:]]), 0, False)[:2],
        evaluated[:2],
        rtol=1e-5,
        atol=1e-6,
    )
