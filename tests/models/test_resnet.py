"""ResNet: published sizes, rules, BatchNorm, identity start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_variables import check_rules, shapes_of

from bigjax.models.resnet import RULES, SIZES, Block, ResNet, forward_flops

# torchvision's counts with 1000 classes; the paper's 6n+2 form plus its projections.
PARAMETERS = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}


def _count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope='module')
def small():
    model = ResNet(classes=3, depth=20, width=4)
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    return model, x, jax.jit(lambda k: model.init(k, x, train=False))(jax.random.key(0))


@pytest.mark.parametrize('depth', [18, 34, 50, pytest.param(101, marks=pytest.mark.slow),
                                   pytest.param(152, marks=pytest.mark.slow)])  # fmt: skip
def test_parameter_count(depth):
    assert (
        _count(shapes_of(ResNet(classes=1000, depth=depth), (64, 64, 3))['params'])
        == (PARAMETERS[depth])
    )


@pytest.mark.parametrize('depth', [20, 32])
def test_small_image_form_has_6n_plus_2_layers(depth):
    params = shapes_of(ResNet(classes=10, depth=depth), (32, 32, 3))['params']
    kernels = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
        if 'kernel' in jax.tree_util.keystr(path) and 'shortcut' not in jax.tree_util.keystr(path)
    ]
    assert len(kernels) == depth
    if depth == 20:
        assert _count(params) == 272_474


@pytest.mark.parametrize('depth', [18, 20, 50])
def test_every_parameter_has_a_rule_of_its_rank(depth):
    params = shapes_of(ResNet(classes=10, depth=depth, width=8), (32, 32, 3))['params']
    check_rules(params, RULES)


@pytest.mark.parametrize('bottleneck', [False, True])
def test_a_block_starts_as_its_shortcut(bottleneck):
    block = Block(width=4, stride=1, bottleneck=bottleneck, dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 16 if bottleneck else 4))
    variables = jax.jit(lambda k: block.init(k, x, train=False))(jax.random.key(1))
    np.testing.assert_array_equal(block.apply(variables, x, train=False), jax.nn.relu(x))


def test_training_normalises_over_the_batch_and_moves_the_averages(small):
    model, x, variables = small

    @jax.jit
    def run(x):
        return model.apply(variables, x, train=True, mutable=['batch_stats'])

    logits, changed = run(x)
    assert (logits.shape, logits.dtype) == ((4, 3), jnp.float32)
    # BatchNorm after the first convolution undoes any scale of the image.
    np.testing.assert_allclose(run(3 * x)[0], logits, rtol=1e-3, atol=1e-3)
    stem = np.asarray(
        jax.lax.conv_general_dilated(
            x, variables['params']['stem']['kernel'], (1, 1), 'SAME',
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )
    )  # fmt: skip
    moved = changed['batch_stats']['stem_norm']
    np.testing.assert_allclose(moved['mean'], 0.1 * stem.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moved['var'], 0.9 + 0.1 * stem.var((0, 1, 2)), rtol=1e-4)


def test_evaluation_uses_the_averages_only(small):
    model, x, variables = small
    apply = jax.jit(lambda x: model.apply(variables, x, train=False))
    np.testing.assert_allclose(apply(x)[:2], apply(x.at[2:].set(0))[:2], rtol=1e-5, atol=1e-6)


def test_bfloat16_keeps_float32_statistics(small):
    _, x, variables = small
    model = ResNet(classes=3, depth=20, width=4, dtype=jnp.bfloat16)
    logits, changed = jax.eval_shape(
        lambda x: model.apply(variables, x, train=True, mutable=['batch_stats']), x
    )
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(changed)} == {jnp.dtype('float32')}


def test_unknown_depth_is_refused():
    with pytest.raises(ValueError, match='--depth=19: a ResNet has one of'):
        shapes_of(ResNet(classes=10, depth=19), (8, 8, 3))


def test_flops_are_the_published_ones():
    # Multiply-adds in units of 10^9: torchvision's table says 1.81, 3.66, 4.09, 7.80, 11.51.
    expected = {18: 1.81, 34: 3.66, 50: 4.09, 101: 7.80, 152: 11.51}
    for depth, giga in expected.items():
        assert round(forward_flops((224, 224), 3, 1000, depth=depth) / 2e9, 2) == giga
    assert set(SIZES) > set(expected)
