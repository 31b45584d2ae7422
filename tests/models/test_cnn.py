"""The small CNN: shapes, sizes, rules, dropout."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_variables import check_rules, shapes_of

from bigjax.models.cnn import CNN, RULES, forward_flops


@pytest.fixture(scope='module')
def digits_model():
    model = CNN(classes=10, features=(4, 8), hidden=16, dropout=0.5)
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    return model, x, jax.jit(lambda k: model.init(k, x, train=False))(jax.random.key(0))


@pytest.mark.parametrize(('size', 'flat'), [((28, 28, 1), 3136), ((8, 8, 1), 256)])
def test_parameter_count(size, flat):
    model = CNN(classes=10)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes_of(model, size)))
    assert count == (9 * 32 + 32) + (9 * 32 * 64 + 64) + (flat * 128 + 128) + (128 * 10 + 10)


def test_every_parameter_has_a_rule_of_its_rank(digits_model):
    params = digits_model[2]['params']
    check_rules(params, RULES)


def test_first_kernel_and_head_are_not_split_over_channels_or_classes():
    def axes(name):
        return next(axes for pattern, axes in RULES if re.search(pattern, name))

    assert axes('conv_0/kernel')[:3] == (None, None, None)
    assert axes('conv_1/kernel') == (None, None, 'embed', 'channels')
    assert axes('head/kernel')[1] is None


def test_logits_are_float32_and_do_not_mix_rows(digits_model):
    model, x, variables = digits_model
    apply = jax.jit(lambda x: model.apply(variables, x, train=False))
    logits = apply(x)
    assert (logits.shape, logits.dtype) == ((4, 10), jnp.float32)
    np.testing.assert_allclose(apply(x.at[2:].set(0))[:2], logits[:2], rtol=1e-5, atol=1e-6)


def test_dropout_acts_in_training_only(digits_model):
    model, x, variables = digits_model

    def logits(seed, train):
        return model.apply(variables, x, train=train, rngs={'dropout': jax.random.key(seed)})

    np.testing.assert_array_equal(logits(0, False), logits(1, False))
    assert not np.array_equal(logits(0, True), logits(1, True))


def test_flops():
    # 4×4 image, two convolutions at 4×4 and 2×2 (pooled to 2×2, then too small to pool), head.
    expected = 2 * (16 * 9 * 1 * 2 + 4 * 9 * 2 * 3 + 12 * 5 + 5 * 7)
    assert forward_flops((4, 4), 1, 7, features=(2, 3), hidden=5) == expected


def test_flops_follow_the_model():
    model = CNN(classes=3, features=(2, 4), hidden=5)
    x = jnp.zeros((1, 8, 8, 1))
    shapes = jax.eval_shape(lambda k: model.init(k, x, train=False), jax.random.key(0))
    assert shapes['params']['hidden']['kernel'].shape == (16, 5)
    assert forward_flops((8, 8), 1, 3, features=(2, 4), hidden=5) == 2 * (
        64 * 9 * 2 + 16 * 9 * 2 * 4 + 16 * 5 + 5 * 3
    )
