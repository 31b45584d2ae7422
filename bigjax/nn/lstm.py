"""Long short-term memory as a loop over time, with its gradient written out.

Legend: B batch, T time, H state features, G = 4H in PyTorch's order (input, forget, cell, output),
N = T·B.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from bigjax.nn.time_loop import before, hold, put, split_gradient, step_at

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def lstm_scan(
    z_TBG: Array,
    u_HG: Array,
    b_G: Array,
    h_BH: Array,
    c_BH: Array,
    mask_TB: Array | None,
    reverse: bool,
) -> tuple[Array, Array, Array]:
    """Runs the recurrence a_t = z_t + h_{t-1} U + b, c_t = f c_{t-1} + i g, h_t = o tanh(c_t).

    `z_TBG` is the input's share of the gates; where `mask_TB` (bool) is False the state stays as
    it is. Returns every h [T, B, H], the last h and the last c, last in the direction of the scan.
    Hochreiter and Schmidhuber (1997), with the forget gate of Gers et al. (2000).

    The gradient is written by hand: saved gates spare the loop their recomputation, and dU is one
    matrix product after the loop instead of a sum inside it. One buffer holds z, then the gates,
    then their gradient, since each step reads its slice before it writes it.
    """
    return _forward(z_TBG, u_HG, b_G, h_BH, c_BH, mask_TB, reverse)[0]


def _gates(a_BG: Array) -> Array:
    """The four gates' values, in one pass: sigmoid(x) = (1 + tanh(x/2)) / 2."""
    H = a_BG.shape[-1] // 4
    scale_G = jnp.repeat(jnp.array([0.5, 0.5, 1.0, 0.5], a_BG.dtype), H)[None]
    return scale_G * jnp.tanh(scale_G * a_BG) + (1 - scale_G)


def _forward(z_TBG, u_HG, b_G, h0_BH, c0_BH, mask_TB, reverse):
    T = z_TBG.shape[0]

    def step(n, carry):
        h_BH, c_BH, gates_TBG, h_TBH, c_prev_TBH = carry
        t = step_at(n, T, reverse=reverse)
        gates_BG = _gates(gates_TBG[t] + h_BH @ u_HG + b_G[None])
        i, f, g, o = jnp.split(gates_BG, 4, axis=-1)
        new_c = f * c_BH + i * g
        new_h = hold(mask_TB, t, (o * jnp.tanh(new_c)).astype(h_BH.dtype), h_BH)
        new_c = hold(mask_TB, t, new_c, c_BH)
        saved = (put(gates_TBG, gates_BG, t), put(h_TBH, new_h, t), put(c_prev_TBH, c_BH, t))
        return (new_h, new_c, *saved)

    outputs = (jnp.zeros((T, *h0_BH.shape), h0_BH.dtype), jnp.zeros((T, *c0_BH.shape), c0_BH.dtype))
    carry = lax.fori_loop(0, T, step, (h0_BH, c0_BH, z_TBG, *outputs))
    h_BH, c_BH, gates_TBG, h_TBH, c_prev_TBH = carry
    return (h_TBH, h_BH, c_BH), (gates_TBG, h_TBH, c_prev_TBH, u_HG, h0_BH, mask_TB)


def _backward(reverse, residuals, cotangents):
    gates_TBG, h_TBH, c_prev_TBH, u_HG, h0_BH, mask_TB = residuals
    dy_TBH, dh_BH, dc_BH = cotangents
    T, _, G = gates_TBG.shape
    u_GH = u_HG.T

    def step(n, carry):
        dh_BH, dc_BH, dz_TBG = carry  # Steps not yet reached still hold the gates.
        t = step_at(n, T, reverse=not reverse)
        # The barrier makes one copy of the slice. Without it XLA reads the slice anew wherever it
        # is used, and so must copy the whole buffer before it may overwrite any of it.
        i, f, g, o = jnp.split(lax.optimization_barrier(dz_TBG[t]), 4, axis=-1)
        c_prev_BH = c_prev_TBH[t]
        dh_BH, kept_h = split_gradient(mask_TB, t, dh_BH + dy_TBH[t])
        dc_BH, kept_c = split_gradient(mask_TB, t, dc_BH)
        tanh_c = jnp.tanh(f * c_prev_BH + i * g)
        dc_BH = dc_BH + dh_BH * o * (1 - tanh_c * tanh_c)
        da = (
            dc_BH * g * i * (1 - i),
            dc_BH * c_prev_BH * f * (1 - f),
            dc_BH * i * (1 - g * g),
            dh_BH * tanh_c * o * (1 - o),
        )
        dz_BG = jnp.concatenate(da, axis=-1).astype(u_GH.dtype)
        return dz_BG @ u_GH + kept_h, dc_BH * f + kept_c, put(dz_TBG, dz_BG, t)

    dh_BH, dc_BH, dz_TBG = lax.fori_loop(0, T, step, (dh_BH, dc_BH, gates_TBG))
    h_prev_NH = before(h_TBH, h0_BH, reverse=reverse).reshape(-1, G // 4)
    dz_NG = dz_TBG.reshape(-1, G)
    return dz_TBG, h_prev_NH.T @ dz_NG, dz_NG.sum(0), dh_BH, dc_BH, None


lstm_scan.defvjp(_forward, _backward)
