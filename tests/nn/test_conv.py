"""Convolution layers: parameters, types, what they pass on, and their FLOPs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from bigjax.experiment import UsageError
from bigjax.mesh import make_mesh
from bigjax.nn.conv import Conv, Conv1d, conv, conv1d, conv_flops


def _images(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
    ('layer', 'shape', 'kernel'),
    [
        (Conv(5, dtype=jnp.bfloat16), (2, 4, 4, 3), (3, 3, 3, 5)),
        (Conv(6, groups=3, dtype=jnp.bfloat16), (2, 4, 4, 3), (3, 3, 1, 6)),
        (Conv1d(5, kernel_size=4, dtype=jnp.bfloat16), (2, 4, 3), (4, 3, 5)),
    ],
    ids=['images', 'groups', 'sequences'],
)
def test_a_layer_computes_in_dtype_and_keeps_float32_parameters(layer, shape, kernel):
    x = jnp.ones(shape)
    variables = layer.init(jax.random.key(0), x)
    assert layer.apply(variables, x).dtype == jnp.bfloat16
    assert {v.dtype for v in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
    assert variables['params']['kernel'].shape == kernel


def test_bias_is_added_to_every_pixel():
    layer = Conv(2, kernel_size=(1, 1))
    x = _images((1, 2, 2, 3))
    params = layer.init(jax.random.key(0), x)['params']
    shifted = {**params, 'bias': params['bias'] + jnp.asarray([1.0, -2.0])}
    moved = layer.apply({'params': shifted}, x) - layer.apply({'params': params}, x)
    np.testing.assert_allclose(moved, jnp.broadcast_to(jnp.array([1.0, -2.0]), moved.shape), 1e-6)


def test_a_layer_is_the_function_of_its_parameters():
    x = _images((2, 7, 6, 4))
    given = {'padding': 'VALID', 'dilation': (2, 1), 'groups': 2, 'activation': 'silu'}
    layer = Conv(6, strides=(1, 2), **given, impl='xla')
    params = layer.init(jax.random.key(0), x)['params']
    want = conv(x, params['kernel'], bias=params['bias'], stride=(1, 2), **given, impl='reference')
    got = layer.apply({'params': params}, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert got.shape == (2, 3, 2, 6)


def test_a_causal_layer_goes_on_from_its_state_and_knows_segments():
    x, ids = _images((2, 12, 4)), jnp.repeat(jnp.array([[0, 1], [5, 5]]), 6, axis=1)
    layer = Conv1d(4, kernel_size=3, padding='CAUSAL', dilation=2, groups=4, activation='relu')
    params = layer.init(jax.random.key(0), x)
    whole = layer.apply(params, x)
    first, state = layer.apply(params, x[:, :5], return_state=True)
    rest = layer.apply(params, x[:, 5:], state=state)
    np.testing.assert_array_equal(jnp.concatenate([first, rest], 1), whole)
    packed = layer.apply(params, x, segment_ids=ids)
    np.testing.assert_allclose(packed[1], whole[1], rtol=1e-5, atol=1e-6)
    alone = layer.apply(params, x[:1, 6:])
    np.testing.assert_allclose(packed[:1, 6:], alone, rtol=1e-5, atol=1e-6)
    strided = Conv1d(4, kernel_size=3, padding='CAUSAL', stride=3, dilation=2, groups=4)
    assert strided.apply(params, x).shape == (2, 4, 4)


def test_what_the_named_implementation_cannot_run_is_told_in_terms_of_the_flag():
    with jax.enable_x64(True):
        x, w = jnp.zeros((1, 4, 4, 2), jnp.float64), jnp.zeros((3, 3, 2, 2), jnp.float64)
        with pytest.raises(UsageError) as error:
            conv(x, w, impl='tpu')
    assert str(error.value).startswith('--conv=tpu: ')
    assert str(error.value).endswith('; try --conv=xla')
    assert "impl='" not in str(error.value)


def test_what_does_not_fit_is_no_matter_of_the_flag():
    with pytest.raises(ValueError, match='groups=2') as error:
        conv1d(jnp.zeros((1, 4, 3)), jnp.zeros((3, 1, 2)), groups=2, impl='xla')
    assert not isinstance(error.value, UsageError)
    layer = Conv(4, groups=3)
    with pytest.raises(ValueError, match='groups=3: must divide the 2 channels of x_BHWC'):
        layer.init(jax.random.key(0), jnp.zeros((1, 4, 4, 2)))


def test_flops_count_two_per_multiply_add():
    # 5×5 image, stride 2: 3×3 outputs of 3·3·2 multiply-adds for each of 4 features.
    flops, size = conv_flops((5, 5), 2, 4, strides=(2, 2))
    assert (flops, size) == (2 * 9 * 18 * 4, (3, 3))
    # With two rows of padding above alone, 3 × 2 outputs.
    flops, size = conv_flops((5, 5), 2, 4, strides=(2, 2), padding=((2, 0), (0, 0)))
    assert (flops, size) == (2 * 6 * 18 * 4, (3, 2))
    # A group of two reads half of the channels; a kernel spread over 5 rows leaves one of 5.
    flops, size = conv_flops((5, 5), 2, 4, padding='VALID', dilation=(2, 1), groups=2)
    assert (flops, size) == (2 * 3 * 9 * 4, (1, 3))


def test_a_kernel_on_a_mesh_is_the_convolution_of_one_device():
    x, w = _images((4, 6, 6, 8)), _images((3, 3, 8, 8), 1)
    want = conv(x, w, impl='reference')
    with jax.set_mesh(make_mesh('data=2,tensor=2', devices=jax.devices()[:4])):
        got = jax.jit(lambda x, w: conv(x, w, impl='tpu'))(x, w)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert got.sharding.spec == PartitionSpec('data', None, None, 'tensor')
