"""Feed-forward networks: shapes, rules, dropout, FLOPs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_variables import check_rules

from bigjax.models.mlp import MLP, RULES, forward_flops, hidden_widths


@pytest.fixture(scope='module')
def model_and_variables():
    model = MLP(outputs=1, widths=(6, 4), dropout=0.5)
    x = jax.random.normal(jax.random.key(1), (5, 3))
    return model, x, model.init(jax.random.key(0), x, train=False)


def test_shapes(model_and_variables):
    model, x, variables = model_and_variables
    shapes = jax.tree.map(jnp.shape, variables['params'])
    assert shapes == {
        'hidden_0': {'kernel': (3, 6), 'bias': (6,)},
        'hidden_1': {'kernel': (6, 4), 'bias': (4,)},
        'head': {'kernel': (4, 1), 'bias': (1,)},
    }
    assert model.apply(variables, x, train=False).shape == (5, 1)


def test_it_is_the_formula(model_and_variables):
    model, x, variables = model_and_variables
    p = jax.tree.map(np.asarray, variables['params'])
    h = np.asarray(x)
    for name in ('hidden_0', 'hidden_1'):
        h = np.maximum(h @ p[name]['kernel'] + p[name]['bias'], 0)
    expected = h @ p['head']['kernel'] + p['head']['bias']
    np.testing.assert_allclose(model.apply(variables, x, train=False), expected, 1e-4, 1e-5)


def test_every_parameter_has_a_rule_of_its_rank(model_and_variables):
    check_rules(model_and_variables[2]['params'], RULES)


def test_dropout_acts_in_training_only(model_and_variables):
    model, x, variables = model_and_variables

    def outputs(seed, train):
        return model.apply(variables, x, train=train, rngs={'dropout': jax.random.key(seed)})

    np.testing.assert_array_equal(outputs(0, False), outputs(1, False))
    assert not np.array_equal(outputs(0, True), outputs(1, True))


def test_bfloat16_gives_float32_outputs(model_and_variables):
    _, x, variables = model_and_variables
    model = MLP(outputs=1, widths=(6, 4), activation='gelu', dtype=jnp.bfloat16)
    assert model.apply(variables, x, train=False).dtype == jnp.float32


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation='tanhh' is unknown"):
        MLP(outputs=1, activation='tanhh').init(jax.random.key(0), jnp.zeros((1, 2)), train=False)


def test_flops():
    assert forward_flops(3, 1, widths=hidden_widths(5, 2)) == 2 * (3 * 5 + 5 * 5 + 5 * 1)
