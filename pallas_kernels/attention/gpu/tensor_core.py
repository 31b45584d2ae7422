"""Products on the tensor cores, in a form that the compiler and the interpreter both take."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def _nothing() -> None:
    pass


def product(
    a_ref: jax.Ref, b_ref: jax.Ref, *, meanwhile: Callable[[], None] = _nothing
) -> jax.Array:
    """Returns float32 `a @ b` of two references to shared memory; `meanwhile` runs beside it."""

    def multiply(out_ref: jax.Ref) -> jax.Array:
        plgpu.wgmma(out_ref, a_ref, b_ref)
        meanwhile()
        return out_ref[...]

    shape = (a_ref.shape[0], b_ref.shape[1])
    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def products(*pairs: tuple[jax.Ref, jax.Ref]) -> list[jax.Array]:
    """Returns float32 `a @ b` of each pair, started together and awaited once."""

    def multiply(*out_refs: jax.Ref) -> list[jax.Array]:
        for out_ref, (a_ref, b_ref) in zip(out_refs, pairs, strict=True):
            plgpu.wgmma(out_ref, a_ref, b_ref)
        return [out_ref[...] for out_ref in out_refs]

    sums = (plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32) for a, b in pairs)
    return pl.run_scoped(multiply, *sums)


def add_product(
    total: jax.Array,
    a: jax.Array,
    b_ref: jax.Ref,
    *,
    interpret: bool,
    meanwhile: Callable[[], None] = _nothing,
) -> jax.Array:
    """Returns float32 `total + a @ b`, with `a` in registers and `b` in shared memory.

    The interpreter of JAX 0.12 knows neither a left operand in registers nor a product that starts
    from a value; there the same sum is written as a plain dot.
    """
    if interpret:
        meanwhile()
        b = b_ref[...]
        plgpu.commit_smem()  # this read is ordered before later copies, as a product's would be
        return total + jnp.dot(a, b, preferred_element_type=jnp.float32)

    def multiply(total_ref: jax.Ref) -> None:
        plgpu.wgmma(total_ref, a, b_ref)
        meanwhile()

    return pl.run_state(multiply)(plgpu.ACC.init(total))
