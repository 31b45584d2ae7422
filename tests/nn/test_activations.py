"""GELU: value and written-out gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax.nn.activations import gelu, gelu_erf


@pytest.mark.parametrize(('gelu', 'approximate'), [(gelu, True), (gelu_erf, False)])
def test_gelu_equals_the_plain_form_in_value_and_gradient_in_float64(gelu, approximate):
    with jax.enable_x64(True):
        x, g = np.linspace(-6, 6, 97), np.linspace(1, 2, 97)
        y, vjp = jax.vjp(gelu, jnp.asarray(x))
        want, want_vjp = jax.vjp(lambda x: jax.nn.gelu(x, approximate=approximate), jnp.asarray(x))
        np.testing.assert_allclose(y, want, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(vjp(g)[0], want_vjp(g)[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize('gelu', [gelu, gelu_erf])
def test_gelu_keeps_the_input_type(gelu):
    x = jnp.ones(3, jnp.bfloat16)
    y, vjp = jax.vjp(gelu, x)
    assert y.dtype == vjp(y)[0].dtype == jnp.bfloat16
