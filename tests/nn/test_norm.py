"""Norms: values and written-out gradients against the plain form, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax.nn.norm import LayerNorm, RMSNorm, layer_norm, rms_norm


def plain_layer_norm(x, scale_C, bias_C):
    centred = x - x.mean(-1, keepdims=True)
    unit = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return unit * scale_C[None, None] + bias_C[None, None]


def plain_rms_norm(x, scale_C):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale_C[None, None]


def arguments(count):
    keys = jax.random.split(jax.random.key(0), 4)
    x_BTC = 3 * jax.random.normal(keys[0], (2, 5, 12), jnp.float64) + 1
    vectors = [jax.random.normal(key, (12,), jnp.float64) for key in keys[1:3]]
    return (x_BTC, *vectors)[:count], jax.random.normal(keys[3], (2, 5, 12), jnp.float64)


@pytest.mark.parametrize(
    ('ours', 'plain', 'count'),
    [
        (layer_norm, plain_layer_norm, 3),
        (lambda x, scale: layer_norm(x, scale), lambda x, s: plain_layer_norm(x, s, 0 * s), 2),
        (rms_norm, plain_rms_norm, 2),
    ],
    ids=['layer_norm', 'layer_norm without bias', 'rms_norm'],
)
def test_value_and_gradient_equal_the_plain_form_in_float64(ours, plain, count):
    with jax.enable_x64(True):
        args, g = arguments(count)
        for got, want in zip(
            jax.tree.leaves(jax.vjp(ours, *args)[1](g)) + [ours(*args)],
            jax.tree.leaves(jax.vjp(plain, *args)[1](g)) + [plain(*args)],
            strict=True,
        ):
            assert got.dtype == jnp.float64
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_a_large_mean_does_not_cost_precision():
    x = jax.random.normal(jax.random.key(0), (4, 64))
    far = layer_norm(x + 1000.0, jnp.ones(64))
    np.testing.assert_allclose(far, layer_norm(x, jnp.ones(64)), atol=1e-3)


@pytest.mark.parametrize('layer', [LayerNorm(dtype=jnp.bfloat16), RMSNorm(dtype=jnp.bfloat16)])
def test_bfloat16_has_float32_parameters_statistics_and_gradients(layer):
    x = jax.random.normal(jax.random.key(0), (4, 64), jnp.bfloat16)
    variables = layer.init(jax.random.key(1), x)
    y = layer.apply(variables, x)
    exact = type(layer)().apply(variables, x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    # Half a unit in the last place: only the result was rounded.
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8)
    grads, dx = jax.grad(lambda v, x: layer.apply(v, x).astype(jnp.float32).sum(), (0, 1))(
        variables, x
    )
    assert dx.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype('float32')}
