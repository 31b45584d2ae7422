"""Vision Transformer: published sizes and FLOPs, rules, patches, positions, stochastic depth."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrix_flops import matrix_flops
from model_variables import check_rules, shapes_of

from bigjax.experiment import UsageError
from bigjax.models.vit import RULES, Block, ViT, forward_flops, sincos2d
from bigjax.nn.stack import stack_layers

# timm's counts with 1000 classes; torchvision has the same for B and L.
PARAMETERS = {
    'Ti/16': 5_717_416,
    'S/16': 22_050_664,
    'B/16': 86_567_656,
    'B/32': 88_224_232,
    'L/16': 304_326_632,
    'H/14': 632_045_800,
}
TINY = {'variant': 'Ti/4', 'depth': 2, 'heads': 2, 'width': 8}


@pytest.fixture(scope='module')
def small():
    """A model of random parameters (its own head is zero), images and variables."""
    model = ViT(classes=3, **TINY)
    x = np.random.default_rng(1).standard_normal((2, 8, 12, 1), np.float32)
    draw = np.random.default_rng(0).standard_normal
    shapes = shapes_of(model, x.shape[1:])
    return model, x, jax.tree.map(lambda leaf: draw(leaf.shape, np.float32), shapes)


@pytest.mark.parametrize('variant', list(PARAMETERS))
def test_parameter_count(variant):
    params = shapes_of(ViT(classes=1000, variant=variant, scan=True), (224, 224, 3))['params']
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS[variant]


@pytest.mark.parametrize('scan', [False, True])
def test_every_parameter_has_a_rule_of_its_rank(scan):
    params = shapes_of(ViT(classes=10, scan=scan, **TINY), (8, 8, 3))['params']
    assert 'class_token' in params
    for name, _, axes in check_rules(params, RULES):
        assert axes[0] == 'layers' or 'blocks' not in name, name


@pytest.mark.parametrize('pool', ['token', 'mean'])
def test_flops_follow_the_model(pool):
    model = ViT(classes=5, pool=pool, scan=True, **TINY)
    apply = lambda v, x: model.apply(v, x, train=False)  # noqa: E731
    size = (16, 24, 3)
    traced = matrix_flops(apply, shapes_of(model, size), jnp.zeros((1, *size)))
    assert forward_flops((16, 24), 3, 5, pool=pool, **TINY) == traced


def test_flops_are_the_published_ones():
    # Multiply-adds in units of 10^9, as torchvision tells them.
    for variant, giga in {'B/16': 17.564, 'B/32': 4.409, 'L/16': 61.555, 'H/14': 167.295}.items():
        assert round(forward_flops((224, 224), 3, 1000, variant=variant) / 2e9, 3) == giga


def test_patches_are_what_a_strided_convolution_reads(small):
    model, x, variables = small
    params = variables['params']
    _, state = jax.jit(
        lambda x: model.apply(variables, x, train=False, capture_intermediates=True)
    )(x)
    ours = state['intermediates']['patch']['__call__'][0]
    convolved = jax.lax.conv_general_dilated(
        x, params['patch']['kernel'], (4, 4), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    expected = convolved.reshape(2, 6, 8) + params['patch']['bias'][None, None]
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_scan_and_remat_change_no_number(small):
    model, x, variables = small
    scanned = ViT(classes=3, scan=True, remat='full', **TINY)
    ours = jax.jit(lambda x: model.apply(variables, x, train=False))(x)
    assert (ours.shape, ours.dtype) == ((2, 3), jnp.float32)
    other = jax.jit(lambda x: scanned.apply(stack_layers(variables), x, train=False))(x)
    np.testing.assert_allclose(ours, other, rtol=1e-5, atol=1e-5)


def test_mean_without_positions_does_not_see_the_order_of_patches(small):
    _, x, variables = small
    x = x[:, :4]
    model = ViT(classes=3, pool='mean', **TINY)
    params = {k: v for k, v in variables['params'].items() if k != 'class_token'}
    params['position'] = jnp.zeros((3, 8))

    @jax.jit
    def logits(x, position):
        return model.apply({'params': {**params, 'position': position}}, x, train=False)

    turned = jnp.roll(x, 4, axis=2)
    ours = logits(x, params['position'])
    np.testing.assert_allclose(logits(turned, params['position']), ours, rtol=1e-4, atol=1e-5)
    learned = jax.random.normal(jax.random.key(0), (3, 8))
    assert not np.allclose(logits(turned, learned), logits(x, learned), atol=1e-2)


def test_sine_positions_tell_patches_apart_and_are_no_parameter():
    table = sincos2d((5, 7), 16)
    distance = np.abs(table[:, None] - table[None]).sum(-1) + 9 * np.eye(35)
    assert table.shape == (35, 16)
    assert distance.min() > 0.1
    # Rows share half of their code, columns the other.
    grid = table.reshape(5, 7, 16)
    assert (grid[:, :, :8] == grid[:1, :, :8]).all()
    assert (grid[:, :, 8:] == grid[:, :1, 8:]).all()
    params = shapes_of(ViT(classes=3, positions='sincos2d', **TINY), (8, 8, 1))['params']
    assert 'position' not in params


def test_stochastic_depth_leaves_whole_branches_out():
    block = Block(heads=2, dropout=0.0, dtype=jnp.float32)
    draw = np.random.default_rng(0).standard_normal
    x = np.broadcast_to(draw((1, 3, 8), np.float32), (64, 3, 8))
    shapes = jax.eval_shape(lambda k: block.init(k, x, None, train=False), jax.random.key(0))
    variables = jax.tree.map(lambda leaf: draw(leaf.shape, np.float32), shapes)
    plain, _ = jax.jit(lambda: block.apply(variables, x, None, train=False))()

    @jax.jit
    def run(rate):
        rngs = {'dropout': jax.random.key(2)}
        return block.apply(variables, x, rate, train=True, rngs=rngs)[0]

    changed = np.abs(np.asarray(run(0.5) - x)).max((1, 2))
    assert 4 < (changed == 0).sum() < 32  # both branches left out: a quarter of the rows
    np.testing.assert_allclose(run(0.0), plain, rtol=1e-5, atol=1e-5)


def test_first_layer_is_never_left_out_and_evaluation_leaves_none(small):
    _, x, variables = small
    model = ViT(classes=3, drop_path=0.9, **TINY)

    @jax.jit(static_argnums=(1,))
    def run(seed, train):
        rngs = {'dropout': jax.random.key(seed)}
        return model.apply(variables, x, train=train, rngs=rngs)

    np.testing.assert_array_equal(run(0, False), run(1, False))
    # The last layer, the second, is mostly left out: then the logits are those of the first alone.
    single = ViT(classes=3, **{**TINY, 'depth': 1})
    params = {name: value for name, value in variables['params'].items() if name != 'block_1'}
    expected = jax.jit(lambda: single.apply({'params': params}, x, train=False))()
    close = [np.allclose(run(seed, True), expected, rtol=1e-4, atol=1e-4) for seed in range(8)]
    assert any(close)


@pytest.mark.parametrize(
    ('knobs', 'message'),
    [
        ({'variant': 'M/16'},
         '--variant=M/16: must be Ti, S, B, L, H, a slash and the side of a patch in pixels; '
         'try --variant=B/16'),
        ({'variant': 'Ti/5'},
         '--variant=Ti/5: patches of 5 pixels do not divide images of 8 × 12; try --variant=Ti/4'),
        ({'variant': 'Ti/4', 'heads': 5},
         '--heads=5: width 192 must be a multiple of heads; try --heads=4'),
        ({'variant': 'Ti/4', 'width': 6, 'heads': 2, 'positions': 'sincos2d'},
         '--width=6: must be 8, 12, 16, … for --positions=sincos2d; try --width=8'),
    ],
)  # fmt: skip
def test_mistakes_are_refused(knobs, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        shapes_of(ViT(classes=3, **knobs), (8, 12, 1))
