"""Operations counted in what a function traces to, against hand-computed cases."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from bigjax.mesh import AXES
from bigjax.nn.attention import attention
from bigjax.plan.arithmetic.traced import matrix_flops
from pallas_kernels.chip import CHIPS

MATRIX = jax.ShapeDtypeStruct((8, 8), jnp.float32)
ONE = 2 * 8 * 8 * 8


def test_a_loop_counts_as_often_as_it_runs():
    product = lambda x, _: (x @ x, None)  # noqa: E731
    assert matrix_flops(lambda x: jax.lax.scan(product, x, None, length=5)[0], MATRIX) == 5 * ONE


def test_what_nothing_needs_is_not_counted():
    def first(x):
        return (x @ x, x.T @ x)[0]

    assert matrix_flops(first, MATRIX) == ONE


def test_the_longest_branch_counts():
    branches = (lambda x: x, lambda x: x @ x, lambda x: x @ x @ x)
    assert matrix_flops(lambda x: jax.lax.switch(x[0, 0].astype(int), branches, x), MATRIX) == (
        2 * ONE
    )


@pytest.mark.parametrize(('stride', 'pairs'), [(1, 10), (2, 5)])
def test_padding_counts_where_it_is_asked_for(stride, pairs):
    """Of four places along a side, three taps each, ten pairs exist, or of two places five."""
    image = jax.ShapeDtypeStruct((2, 4, 4, 3), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 3, 5), jnp.float32)

    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )

    features = 2 * 2 * 3 * 5
    assert matrix_flops(convolve, image, kernel) == features * pairs**2
    places = 4 // stride
    assert matrix_flops(convolve, image, kernel, padding=True) == features * (3 * places) ** 2
    # The window's gradient meets the same pairs.
    gradient = jax.grad(lambda w, x: convolve(x, w).sum())
    assert matrix_flops(gradient, kernel, image) == features * pairs**2


def test_what_is_mapped_counts_for_all_devices():
    mesh = jax.make_mesh((4,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(lambda x, w: x @ w, in_specs=(P('data'), P()), out_specs=P('data'))
        assert matrix_flops(mapped, MATRIX, MATRIX) == ONE


@pytest.mark.parametrize(('causal', 'pairs'), [(True, 128 * 129 // 2), (False, 128 * 128)])
def test_kernels_count_the_pairs_that_are_seen(causal, pairs):
    """Two products forward and five backward, of all heads."""
    chip = jax.sharding.AbstractDevice(CHIPS['v5e'].kind, 1, 'tpu')
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    alone = (1,) * len(AXES)
    mesh = jax.sharding.AbstractMesh(alone, AXES, axis_types=auto, abstract_device=chip)
    x_BTHD = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    total = lambda *qkv: attention(*qkv, causal=causal).astype(jnp.float32).sum()  # noqa: E731
    with jax.sharding.use_abstract_mesh(mesh):
        found = matrix_flops(jax.grad(total, argnums=(0, 1, 2)), x_BTHD, x_BTHD, x_BTHD)
    assert found == 7 * 2 * pairs * 2 * 64
