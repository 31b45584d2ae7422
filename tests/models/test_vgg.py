"""VGG: published sizes and FLOPs, rules, BatchNorm, the form for small images."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrix_flops import matrix_flops
from model_variables import check_rules, drawn, shapes_of

from bigjax.experiment import UsageError
from bigjax.models.vgg import RULES, SIZES, VGG, forward_flops

# torchvision's counts with 1000 classes: without BatchNorm, and with it.
PARAMETERS = {
    11: (132_863_336, 132_868_840),
    13: (133_047_848, 133_053_736),
    16: (138_357_544, 138_365_992),
    19: (143_667_240, 143_678_248),
}


@pytest.fixture(scope='module')
def small():
    model = VGG(classes=3, depth=11, batch_norm=True, width=2, hidden=8, small_stem=True)
    x = np.random.default_rng(0).standard_normal((4, 7, 7, 1), np.float32)
    return model, x, drawn(shapes_of(model, x.shape[1:]))


@pytest.mark.parametrize('batch_norm', [False, True])
@pytest.mark.parametrize('depth', list(SIZES))
def test_parameter_count(depth, batch_norm):
    params = shapes_of(VGG(classes=1000, depth=depth, batch_norm=batch_norm), (32, 32, 3))['params']
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS[depth][batch_norm]
    kernels = [p for p, _ in jax.tree_util.tree_leaves_with_path(params) if p[-1].key == 'kernel']
    assert len(kernels) == depth


@pytest.mark.parametrize('small_stem', [False, True])
def test_every_parameter_has_a_rule_of_its_rank(small_stem):
    model = VGG(classes=10, depth=19, batch_norm=True, width=8, hidden=8, small_stem=small_stem)
    check_rules(shapes_of(model, (32, 32, 3))['params'], RULES)


def test_flops_are_the_published_ones():
    # Multiply-adds in units of 10^9, as torchvision tells them.
    for depth, giga in {11: 7.609, 13: 11.308, 16: 15.470, 19: 19.632}.items():
        assert round(forward_flops((224, 224), 3, 1000, depth=depth) / 2e9, 3) == giga


@pytest.mark.parametrize(
    ('size', 'small_stem'), [((224, 224), False), ((28, 28), True), ((8, 9), True)]
)
def test_flops_follow_the_model(size, small_stem):
    shape = {'depth': 13, 'width': 4, 'hidden': 12, 'small_stem': small_stem}
    model = VGG(classes=5, **shape)
    apply = lambda v, x: model.apply(v, x, train=False)  # noqa: E731
    traced = matrix_flops(apply, shapes_of(model, (*size, 3)), jnp.zeros((1, *size, 3)))
    assert forward_flops(size, 3, 5, **shape) == traced


@pytest.mark.parametrize(('side', 'pixels'), [(1, 1), (8, 1), (28, 1), (32, 1), (33, 2), (64, 2)])
def test_last_map_of_the_small_form(side, pixels):
    model = VGG(classes=10, depth=11, width=2, hidden=8, small_stem=True)
    kernel = shapes_of(model, (side, side, 1))['params']['hidden_0']['kernel']
    assert kernel.shape == (pixels, pixels, 16, 8)


def test_small_form_sees_every_pixel(small):
    model, x, variables = small
    gradient = jax.jit(jax.grad(lambda x: model.apply(variables, x, train=False).sum()))
    assert (np.abs(gradient(x)).sum((0, 3)) > 0).all()


def test_training_moves_the_averages_and_drops(small):
    model, x, variables = small

    @jax.jit
    def run(seed):
        rngs = {'dropout': jax.random.key(seed)}
        return model.apply(variables, x, train=True, rngs=rngs, mutable=['batch_stats'])

    (logits, changed), (other, _) = run(0), run(1)
    assert (logits.shape, logits.dtype) == ((4, 3), jnp.float32)
    assert not np.array_equal(logits, other)
    for new, old in zip(*map(jax.tree.leaves, (changed, variables['batch_stats'])), strict=True):
        assert not np.array_equal(new, old)


def test_unknown_depth_is_refused():
    message = '--depth=12: a VGG has one of [11, 13, 16, 19] layers; try --depth=16'
    with pytest.raises(UsageError, match=re.escape(message)):
        shapes_of(VGG(classes=10, depth=12), (8, 8, 3))
