"""One kind's kernels beside the specification: all three passes, as they are for a chip.

Legend: B batch, H W rows and columns, P Q output rows and columns, K L taps, C O channels.
"""

from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chip as chips
from pallas_kernels.conv import reference
from pallas_kernels.conv.arguments import ConvBlockSizes, Operands, Spec

# What no copy and no store has filled is not a number, and nobody may read behind an end.
TWO_CORES = pltpu.InterpretParams(
    detect_races=True,
    num_cores_or_threads=2,
    out_of_bounds_reads='uninitialized',
    uninitialized_memory='nan',
)


class Call(NamedTuple):
    """The shapes of one call, and blocks so small that there are several."""

    image: tuple[int, int, int, int]
    kernel: tuple[int, int, int]
    spec: Spec
    sizes: ConvBlockSizes | None = None
    epilogue: bool = False
    dtype: str = 'float32'


def drawn(call: Call) -> tuple[Operands, jax.Array]:
    """Returns a call's operands and a cotangent of u."""
    draw = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(draw.normal(size=shape), call.dtype)  # noqa: E731
    (B, H, W, C), (K, L, features) = call.image, call.kernel
    out = (B, *call.spec.out_size((H, W), (K, L)), features)
    operands = Operands(normal(*call.image), normal(K, L, C // call.spec.groups, features))
    if call.epilogue:
        operands = operands._replace(
            **{name: normal(features) for name in ('bias_O', 'scale_O', 'shift_O')},
            residual_BPQO=normal(*out),
        )
    return operands, normal(*out)


def passes(
    module: ModuleType, call: Call, chip: str | None = None, interpret: Any = True
) -> dict[str, np.ndarray]:
    """Returns y, u, dx and dw by the kernels as they are for `chip`; None counts as a v5e."""
    device = chip and jax.sharding.AbstractDevice(chips.named(chip).kind, 1, 'tpu')
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    more = {'interpret': interpret}

    def run(operands, du):
        y, u = module.forward(operands, call.spec, call.sizes, call.epilogue, **more)
        dx = module.input_gradient(du, operands, call.spec, call.sizes, **more)
        dw = module.weight_gradient(du, operands, call.spec, call.sizes, **more)
        return {'y': y, 'u': u, 'dx': dx, 'dw': dw}

    operands, du = drawn(call)
    with jax.sharding.use_abstract_mesh(mesh):
        made = jax.jit(run)(operands, du)
    assert {x.dtype for x in made.values() if x is not None} == {jnp.dtype(call.dtype)}
    return {name: np.asarray(x, np.float32) for name, x in made.items() if x is not None}


def assert_right(module: ModuleType, call: Call, chip: str | None = None, **more: Any) -> None:
    """Holds all passes against the specification in float32, up to one rounding to the type."""
    operands, du = jax.tree.map(lambda x: x.astype(jnp.float32), drawn(call))
    y, u = reference.forward(operands, call.spec, None, keep=True)
    want = {
        'y': y,
        'u': u,
        'dx': reference.input_gradient(du, operands, call.spec),
        'dw': reference.weight_gradient(du, operands, call.spec),
    }
    one = float(jnp.finfo(call.dtype).eps)
    for name, got in passes(module, call, chip, **more).items():
        exact = np.asarray(want[name])
        # Sums in another order, and where it is bfloat16 the result's own rounding.
        slack = 3e-6 * np.abs(exact).max()
        np.testing.assert_allclose(got, exact, rtol=one, atol=slack, err_msg=name)
