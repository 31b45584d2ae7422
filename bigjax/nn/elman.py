"""The simple recurrent network of Elman as a loop over time, with its gradient written out.

Legend: B batch, T time, H state features, N = T·B.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from bigjax.nn.time_loop import before, hold, put, split_gradient, step_at

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def elman_scan(
    z_TBH: Array, u_HH: Array, b_H: Array, h_BH: Array, mask_TB: Array | None, reverse: bool
) -> tuple[Array, Array]:
    """Runs the recurrence h_t = tanh(z_t + h_{t-1} U + b) of Elman (1990).

    `z_TBH` is the input's share; where `mask_TB` (bool) is False the state stays as it is. Returns
    every h [T, B, H] and the last one, last in the direction of the scan.

    The gradient is written by hand: dU is one matrix product after the loop instead of a sum inside
    it, and the outputs are all that is saved.
    """
    return _forward(z_TBH, u_HH, b_H, h_BH, mask_TB, reverse)[0]


def _forward(z_TBH, u_HH, b_H, h0_BH, mask_TB, reverse):
    T = z_TBH.shape[0]

    def step(n, carry):
        h_BH, h_TBH = carry  # Steps not yet reached still hold z.
        t = step_at(n, T, reverse=reverse)
        new_BH = hold(mask_TB, t, jnp.tanh(h_TBH[t] + h_BH @ u_HH + b_H[None]), h_BH)
        return new_BH, put(h_TBH, new_BH, t)

    h_BH, h_TBH = lax.fori_loop(0, T, step, (h0_BH, z_TBH))
    return (h_TBH, h_BH), (h_TBH, u_HH, h0_BH, mask_TB)


def _backward(reverse, residuals, cotangents):
    h_TBH, u_HH, h0_BH, mask_TB = residuals
    dy_TBH, dh_BH = cotangents
    T, _, H = h_TBH.shape
    u_T_HH = u_HH.T

    def step(n, carry):
        dh_BH, dz_TBH = carry  # Steps not yet reached still hold dy.
        t = step_at(n, T, reverse=not reverse)
        dh_BH, kept_BH = split_gradient(mask_TB, t, dh_BH + dz_TBH[t])
        dz_BH = dh_BH * (1 - h_TBH[t] * h_TBH[t])
        return dz_BH @ u_T_HH + kept_BH, put(dz_TBH, dz_BH, t)

    dh_BH, dz_TBH = lax.fori_loop(0, T, step, (dh_BH, dy_TBH))
    dz_NH = dz_TBH.reshape(-1, H)
    h_prev_NH = before(h_TBH, h0_BH, reverse=reverse).reshape(-1, H)
    return dz_TBH, h_prev_NH.T @ dz_NH, dz_NH.sum(0), dh_BH, None


elman_scan.defvjp(_forward, _backward)
