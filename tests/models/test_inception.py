"""Inception: published sizes and FLOPs, rules, auxiliary heads, forms for small images."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrix_flops import matrix_flops
from model_variables import check_rules, drawn, shapes_of

from bigjax.experiment import UsageError
from bigjax.models.inception import RULES, SIZES, Inception, forward_flops, size

# torchvision's counts with 1000 classes: without auxiliary heads, and with them.
PARAMETERS = {1: (6_624_904, 13_004_888), 3: (23_834_568, 27_161_264)}
SIDE = {1: 224, 3: 299}


def _cut(version):
    """A version of fewer blocks, one of each kind: what is tested by numbers must compile."""
    own = SIZES[version]
    cut = {1: (own.stages[0], own.stages[1][:1], own.stages[2][:1]),
           3: (own.stages[0][:1], own.stages[1][:2], own.stages[2][:2])}  # fmt: skip
    places = {1: ((1, 0),), 3: ((1, 1),)}
    return own._replace(stages=cut[version], auxiliary=places[version])


@pytest.fixture(scope='module', params=list(SIZES))
def small(request):
    patch = pytest.MonkeyPatch()
    patch.setitem(SIZES, request.param, _cut(request.param))
    model = Inception(classes=3, version=request.param, width=2, small_stem=True)
    x = np.random.default_rng(0).standard_normal((4, 9, 9, 1), np.float32)
    yield model, x, drawn(shapes_of(model, x.shape[1:]))
    patch.undo()


@pytest.mark.parametrize('auxiliary', [False, True])
@pytest.mark.parametrize('version', list(SIZES))
def test_parameter_count(version, auxiliary):
    model = Inception(classes=1000, version=version, auxiliary=auxiliary)
    params = shapes_of(model, (75, 75, 3))['params']
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS[version][auxiliary]


@pytest.mark.parametrize('version', list(SIZES))
def test_every_parameter_has_a_rule_of_its_rank(version):
    params = shapes_of(Inception(classes=10, version=version, width=8), (75, 75, 3))['params']
    check_rules(params, RULES)


def test_flops_are_the_published_ones():
    # Multiply-adds in units of 10^9, as torchvision tells them.
    for version, giga in {1: 1.498, 3: 5.713}.items():
        sides = (SIDE[version],) * 2
        assert round(forward_flops(sides, 3, 1000, version=version) / 2e9, 3) == giga


@pytest.mark.parametrize('version', list(SIZES))
@pytest.mark.parametrize('small_stem', [False, True])
def test_flops_follow_the_model(version, small_stem):
    sides = ((16, 16), (34, 35))[version == 3] if small_stem else (SIDE[version],) * 2
    # Few channels, which `conv` leaves to XLA: Winograd's form takes fewer products.
    shape = {'version': version, 'width': 4, 'small_stem': small_stem}
    model = Inception(classes=5, auxiliary=False, **shape)
    apply = lambda v, x: model.apply(v, x, train=False)  # noqa: E731
    traced = matrix_flops(apply, shapes_of(model, (*sides, 3)), jnp.zeros((1, *sides, 3)))
    assert forward_flops(sides, 3, 5, **shape) == traced


@pytest.mark.parametrize('version', list(SIZES))
def test_flops_of_training_have_the_auxiliary_heads(version):
    # Sides at which the heads' averages are exact: no matrix product takes them.
    sides = ({1: 64, 3: 299}[version],) * 2
    shape = {'version': version, 'width': 4}
    model = Inception(classes=5, **shape)

    def train(variables, x):
        rngs = {'dropout': jax.random.key(0)}
        return model.apply(variables, x, train=True, rngs=rngs, mutable=['batch_stats'])

    traced = matrix_flops(train, shapes_of(model, (*sides, 3)), jnp.zeros((1, *sides, 3)))
    assert forward_flops(sides, 3, 5, auxiliary=True, **shape) == traced


def test_widths_scale_together():
    assert size(1, 64) == SIZES[1]
    assert size(3, 32) == SIZES[3]
    half = size(3, 16)
    assert [step.features for step in half.stem if hasattr(step, 'features')] == [
        16,
        16,
        32,
        40,
        96,
    ]
    assert half.auxiliary_convs[1].features == 384
    assert size(1, 16).auxiliary_hidden == 256


def test_auxiliary_heads_are_for_training(small):
    model, x, variables = small

    @jax.jit
    def train(variables):
        rngs = {'dropout': jax.random.key(0)}
        return model.apply(variables, x, train=True, rngs=rngs, mutable=['batch_stats'])

    evaluate = jax.jit(lambda variables: model.apply(variables, x, train=False))
    (logits, auxiliary), changed = train(variables)
    assert logits.shape == auxiliary.shape == (4, 3)
    assert logits.dtype == auxiliary.dtype == jnp.float32
    stats = variables['batch_stats']
    for new, old in zip(*map(jax.tree.leaves, (changed['batch_stats'], stats)), strict=True):
        assert not np.array_equal(new, old)
    # Evaluation has no such head: it does without its parameters.
    without = {name: value for name, value in variables['params'].items() if name != 'auxiliary_0'}
    evaluated = evaluate({**variables, 'params': without})
    assert (evaluated.shape, evaluated.dtype) == ((4, 3), jnp.float32)


def test_branches_end_side_by_side(small):
    model, _, variables = small
    own = size(model.version, model.width)
    block = variables['params']['stage_0_block_0']
    joined = sum(branch[-1].features for branch in own.stages[0][0])
    following = 'stage_0_block_1' if model.version == 1 else 'stage_1_block_0'
    assert variables['params'][following]['branch_0_conv_0']['kernel'].shape[2] == joined
    assert set(block) == {
        f'branch_{i}_{kind}_{j}'
        for i, branch in enumerate(own.stages[0][0])
        for j in range(sum(hasattr(step, 'features') for step in branch))
        for kind in ('conv', 'norm')
    }


def test_mistakes_are_refused():
    message = '--version=2: there are Inception versions [1, 3]; try --version=3'
    with pytest.raises(UsageError, match=re.escape(message)):
        shapes_of(Inception(classes=10, version=2), (8, 8, 3))
    message = (
        '--image_size=64: Inception v3 needs images of 75 pixels a side or more; '
        'try --image_size=75'
    )
    with pytest.raises(UsageError, match=re.escape(message)):
        shapes_of(Inception(classes=10, version=3), (80, 64, 3))
