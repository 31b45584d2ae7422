"""Derivatives of convolutions, of any order, over any implementation's three passes.

The first derivative is the implementation's own gradients of input and kernel, with the epilogue's
in plain JAX. Where something differentiates through these in turn, the rules are those of the
specification, in pure JAX: a kernel is never differentiated.
"""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.arrays import accumulator
from pallas_kernels.conv import reference
from pallas_kernels.conv.arguments import ConvBlockSizes, Operands, Spec
from pallas_kernels.conv.epilogue import before_activation, needs_u, slope
from pallas_kernels.conv.reference import features


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2, 3))
def convolve(
    impl: ModuleType,
    operands: Operands,
    spec: Spec,
    block_sizes: ConvBlockSizes | None = None,
) -> jax.Array:
    """Returns y_BPQO in x's type, differentiable any number of times.

    Args:
      impl: a module with `forward`, `input_gradient` and `weight_gradient`, as `reference` has
        them. It may instead have `forward_keeping` and `gradients` as `xla` has them.
      operands: the arrays; all but the segment ids have gradients.
      spec: what is static.
      block_sizes: passed on to `impl`.
    """
    return _forward(impl, spec, block_sizes, False, operands)[0]


def _convolve_fwd(impl, operands, spec, block_sizes):
    # What the backward pass must know statically is told by the structure of the residuals.
    varies = jax.tree.map(
        lambda x: () if x.perturbed else None, operands, is_leaf=lambda x: hasattr(x, 'perturbed')
    )
    operands = jax.tree.map(lambda x: x.value, operands, is_leaf=lambda x: hasattr(x, 'perturbed'))
    keep = needs_u(spec.activation, operands.scale_O is not None)
    y_BPQO, u_BPQO, kept = _forward(impl, spec, block_sizes, keep, operands)
    return y_BPQO, (operands, y_BPQO if spec.activation else None, u_BPQO, kept, varies)


def _convolve_bwd(impl, spec, block_sizes, residuals, dy_BPQO):
    operands, y_BPQO, u_BPQO, kept, varies = residuals
    if isinstance(dy_BPQO, SymbolicZero):
        return (Operands(*[None] * len(operands)),)
    cotangent, du_BPQO = _epilogue_gradients(operands, spec, y_BPQO, u_BPQO, dy_BPQO)
    # The gradient of a network's images is wanted by nobody.
    wanted = varies.x_BHWC is not None, varies.w_KLDO is not None
    dx_BHWC, dw_KLDO = _gradients(impl, spec, block_sizes, wanted, du_BPQO, operands, kept)
    cotangent = cotangent._replace(x_BHWC=dx_BHWC, w_KLDO=dw_KLDO)
    return (cotangent,)


convolve.defvjp(_convolve_fwd, _convolve_bwd, symbolic_zeros=True)


def _epilogue_gradients(operands, spec, y_BPQO, u_BPQO, dy_BPQO) -> tuple[Operands, jax.Array]:
    """Returns the cotangents of what the epilogue takes, None elsewhere, and that of u in x's type.

    As in the forward pass, all of it is in the accumulator's type until it is stored.
    """
    dtype = accumulator(dy_BPQO.dtype)
    scale, shift = features(operands.scale_O), features(operands.shift_O)
    y_BPQO, u_BPQO = (None if x is None else x.astype(dtype) for x in (y_BPQO, u_BPQO))
    dz_BPQO = dy_BPQO.astype(dtype)
    if spec.activation is not None:
        z_BPQO = None
        if u_BPQO is not None:
            z_BPQO = before_activation(u_BPQO, scale, shift, operands.residual_BPQO)
        dz_BPQO *= slope(spec.activation, y_BPQO, z_BPQO)
    du_BPQO = dz_BPQO if scale is None else dz_BPQO * scale.astype(dtype)

    def of(operand, cotangent):
        return None if operand is None else cotangent().astype(operand.dtype)

    cotangent = Operands(
        None,
        None,
        bias_O=of(operands.bias_O, lambda: du_BPQO.sum((0, 1, 2))),
        scale_O=of(operands.scale_O, lambda: (dz_BPQO * u_BPQO).sum((0, 1, 2))),
        shift_O=of(operands.shift_O, lambda: dz_BPQO.sum((0, 1, 2))),
        residual_BPQO=of(operands.residual_BPQO, lambda: dz_BPQO),
    )
    return cotangent, du_BPQO.astype(operands.x_BHWC.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _forward(impl, spec, block_sizes, keep, operands):
    if hasattr(impl, 'forward_keeping'):
        return impl.forward_keeping(operands, spec, block_sizes, keep)
    return *impl.forward(operands, spec, block_sizes, keep), None


@_forward.defjvp
def _forward_jvp(impl, spec, block_sizes, keep, primals, tangents):
    pure = lambda operands: reference.forward(operands, spec, keep=keep)  # noqa: E731
    y_BPQO, u_BPQO, kept = _forward(impl, spec, block_sizes, keep, *primals)
    # What is kept is only another form of the operands to `_gradients_jvp`.
    varied = *jax.jvp(pure, primals, tangents)[1], jax.tree.map(jnp.zeros_like, kept)
    return (y_BPQO, u_BPQO, kept), varied


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _gradients(impl, spec, block_sizes, wanted, du_BPQO, operands, kept):
    x_wanted, w_wanted = wanted
    if hasattr(impl, 'gradients'):
        dx_BHWC, dw_KLDO = impl.gradients(du_BPQO, operands, spec, block_sizes, kept)
        return dx_BHWC if x_wanted else None, dw_KLDO if w_wanted else None
    given = du_BPQO, operands, spec, block_sizes
    dx_BHWC = impl.input_gradient(*given) if x_wanted else None
    return dx_BHWC, impl.weight_gradient(*given) if w_wanted else None


@_gradients.defjvp
def _gradients_jvp(impl, spec, block_sizes, wanted, primals, tangents):
    pure = lambda *given: _gradients.fun(reference, spec, None, wanted, *given, None)  # noqa: E731
    made = _gradients(impl, spec, block_sizes, wanted, *primals)
    return made, jax.jvp(pure, primals[:2], tangents[:2])[1]
