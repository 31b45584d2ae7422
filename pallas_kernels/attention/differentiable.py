"""Derivatives of attention, of any order, over any implementation's forward and backward.

The first derivative is the implementation's own backward pass. Where something differentiates
through these two in turn, the rules are those of the specification, in pure JAX: a kernel is
never differentiated.
"""

import dataclasses
import functools
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.attention import reference
from pallas_kernels.attention.arguments import Operands, Spec
from pallas_kernels.block_sizes import BlockSizes

# Names of o and lse for a policy of `jax.checkpoint`: where both are kept, a kernel runs once.
RESIDUALS = ('attention_output', 'attention_lse')


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2, 3, 4))
def attend(
    impl: ModuleType,
    operands: Operands,
    spec: Spec,
    block_sizes: BlockSizes | None = None,
    with_lse: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns o_BTHV and, if asked for, lse_BHT (else None), differentiable any number of times.

    Args:
      impl: a module with `forward` and `backward`, as `reference` has them. It may have a
        `forward_keeping`, whose third result goes to `backward` as `kept`.
      operands: the arrays; q, k, v, bias and sinks have gradients.
      spec: what is static.
      block_sizes: passed on to `impl`.
      with_lse: whether lse is returned, and its cotangent taken.
    """
    o_BTHV, lse_BHT, _ = _forward(impl, spec, block_sizes, operands)
    return o_BTHV, lse_BHT if with_lse else None


def _attend_fwd(impl, operands, spec, block_sizes, with_lse):
    bias = operands.bias_BHTS
    # What the backward pass must know statically is told by the structure of the residuals.
    bias_varies = () if bias is not None and bias.perturbed else None
    operands = jax.tree.map(lambda x: x.value, operands, is_leaf=lambda x: hasattr(x, 'perturbed'))
    made = named_residuals(_forward(impl, spec, block_sizes, operands))
    o_BTHV, lse_BHT, _ = made
    return (o_BTHV, lse_BHT if with_lse else None), (operands, made, bias_varies)


def _attend_bwd(impl, spec, block_sizes, with_lse, residuals, cotangents):
    operands, made, bias_varies = residuals
    do_BTHV, dlse_BHT = cotangents
    if isinstance(do_BTHV, SymbolicZero):
        do_BTHV = jnp.zeros_like(made[0])
    if isinstance(dlse_BHT, SymbolicZero):
        dlse_BHT = None
    spec = dataclasses.replace(spec, bias_gradient=bias_varies is not None)
    gradients = _backward(impl, spec, block_sizes, operands, made, do_BTHV, dlse_BHT)
    nothing = Operands(*[None] * len(operands))
    cotangent = nothing._replace(
        q_BTHD=gradients.q,
        k_BSKD=gradients.k,
        v_BSKV=gradients.v,
        bias_BHTS=gradients.bias if spec.bias_gradient else None,
        sinks_H=gradients.sinks,
    )
    return (cotangent,)


attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)


def named_residuals(made: tuple) -> tuple:
    """Returns what a forward pass made, output and lse under the names `RESIDUALS`."""
    return *(checkpoint_name(x, name) for x, name in zip(made, RESIDUALS, strict=False)), *made[2:]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _forward(impl, spec, block_sizes, operands):
    if hasattr(impl, 'forward_keeping'):
        return impl.forward_keeping(operands, spec, block_sizes)
    return *impl.forward(operands, spec, block_sizes), None


@_forward.defjvp
def _forward_jvp(impl, spec, block_sizes, primals, tangents):
    pure = lambda operands: reference.forward(operands, spec)  # noqa: E731
    o_BTHV, lse_BHT, kept = _forward(impl, spec, block_sizes, *primals)
    # What is kept is, like o and lse, only another form of the operands to `_backward_jvp`.
    varied = *jax.jvp(pure, primals, tangents)[1], jax.tree.map(jnp.zeros_like, kept)
    return (o_BTHV, lse_BHT, kept), varied


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _backward(impl, spec, block_sizes, operands, made, do_BTHV, dlse_BHT):
    o_BTHV, lse_BHT, kept = made
    more = {} if kept is None else {'kept': kept}
    gradients = impl.backward(
        operands, spec, block_sizes, o_BTHV, lse_BHT, do_BTHV, dlse_BHT, **more
    )
    return gradients if spec.bias_gradient else gradients._replace(bias=None)


@_backward.defjvp
def _backward_jvp(impl, spec, block_sizes, primals, tangents):
    operands, made, *cotangents = primals

    def pure(operands, *cotangents):
        # Of all that the gradient depends on: what the forward pass made comes of these itself.
        return reference.backward(operands, spec, None, *made[:2], *cotangents)

    varied, variation = (operands, *cotangents), (tangents[0], *tangents[2:])
    primal = _backward(impl, spec, block_sizes, *primals)
    return primal, jax.jvp(pure, varied, variation)[1]
