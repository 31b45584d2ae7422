"""The gated recurrent unit as a loop over time, with its gradient written out.

Legend: B batch, T time, H state features, G = 3H in PyTorch's order (reset, update, candidate),
N = T·B.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from bigjax.nn.time_loop import before, hold, put, split_gradient, step_at

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def gru_scan(
    z_TBG: Array,
    u_HG: Array,
    b_G: Array,
    b_H: Array,
    h_BH: Array,
    mask_TB: Array | None,
    reverse: bool,
) -> tuple[Array, Array]:
    """Runs the gated recurrent unit of Cho et al. (2014), its reset after the recurrent product.

    With [r', v', n'] = z_t + b and [r", v", n"] = h_{t-1} U, where `b_H` is added to n":
    r = σ(r' + r"), v = σ(v' + v"), n = tanh(n' + r n"), h_t = n + v (h_{t-1} - n). Cho et al.
    reset the state before the product; this order is cuDNN's and PyTorch's, so weights convert.

    `z_TBG` is the input's share; where `mask_TB` (bool) is False the state stays as it is. Returns
    every h [T, B, H] and the last one, last in the direction of the scan.

    The gradient is written by hand: saved gates spare the loop their recomputation, and dU is one
    matrix product after the loop instead of a sum inside it. One buffer holds z, then the gates,
    then their gradient.
    """
    return _forward(z_TBG, u_HG, b_G, b_H, h_BH, mask_TB, reverse)[0]


def _forward(z_TBG, u_HG, b_G, b_H, h0_BH, mask_TB, reverse):
    T, (_, H) = z_TBG.shape[0], h0_BH.shape

    def step(n, carry):
        h_BH, gates_TBG, q_TBH, h_TBH = carry
        t = step_at(n, T, reverse=reverse)
        z_BG, s_BG = gates_TBG[t] + b_G[None], h_BH @ u_HG
        # sigmoid(x) = (1 + tanh(x/2)) / 2, both gates in one pass.
        rv_BX = 0.5 + 0.5 * jnp.tanh(0.5 * (z_BG[:, : 2 * H] + s_BG[:, : 2 * H]))
        r_BH, v_BH = jnp.split(rv_BX, 2, axis=-1)
        q_BH = s_BG[:, 2 * H :] + b_H[None]
        n_BH = jnp.tanh(z_BG[:, 2 * H :] + r_BH * q_BH)
        new_BH = hold(mask_TB, t, n_BH + v_BH * (h_BH - n_BH), h_BH)
        gates_TBG = put(gates_TBG, jnp.concatenate([rv_BX, n_BH], axis=-1), t)
        return new_BH, gates_TBG, put(q_TBH, q_BH, t), put(h_TBH, new_BH, t)

    empty_TBH = jnp.zeros((T, *h0_BH.shape), h0_BH.dtype)
    carry = lax.fori_loop(0, T, step, (h0_BH, z_TBG, empty_TBH, empty_TBH))
    h_BH, gates_TBG, q_TBH, h_TBH = carry
    return (h_TBH, h_BH), (gates_TBG, q_TBH, h_TBH, u_HG, h0_BH, mask_TB)


def _backward(reverse, residuals, cotangents):
    gates_TBG, q_TBH, h_TBH, u_HG, h0_BH, mask_TB = residuals
    dy_TBH, dh_BH = cotangents
    T, _, H = h_TBH.shape
    u_GH = u_HG.T
    h_prev_TBH = before(h_TBH, h0_BH, reverse=reverse)

    def step(n, carry):
        dh_BH, dz_TBG, dq_TBH = carry  # Steps not yet reached still hold the gates and q.
        t = step_at(n, T, reverse=not reverse)
        # One copy of each slice; without it XLA reads them anew wherever they are used, and so
        # must copy the whole buffer before it may overwrite any of it.
        gates_BG, q_BH = lax.optimization_barrier((dz_TBG[t], dq_TBH[t]))
        r_BH, v_BH, n_BH = jnp.split(gates_BG, 3, axis=-1)
        dh_BH, kept_BH = split_gradient(mask_TB, t, dh_BH + dy_TBH[t])
        dn_BH = dh_BH * (1 - v_BH) * (1 - n_BH * n_BH)
        dv_BH = dh_BH * (h_prev_TBH[t] - n_BH) * v_BH * (1 - v_BH)
        dr_BH = dn_BH * q_BH * r_BH * (1 - r_BH)
        dq_BH = dn_BH * r_BH
        # The input's share and the recurrent one differ in the candidate alone.
        ds_BG = jnp.concatenate([dr_BH, dv_BH, dq_BH], axis=-1)
        dz_TBG = put(dz_TBG, jnp.concatenate([dr_BH, dv_BH, dn_BH], axis=-1), t)
        return ds_BG @ u_GH + dh_BH * v_BH + kept_BH, dz_TBG, put(dq_TBH, dq_BH, t)

    dh_BH, dz_TBG, dq_TBH = lax.fori_loop(0, T, step, (dh_BH, gates_TBG, q_TBH))
    dz_NG, dq_NH = dz_TBG.reshape(-1, 3 * H), dq_TBH.reshape(-1, H)
    ds_NG = jnp.concatenate([dz_NG[:, : 2 * H], dq_NH], axis=-1)
    du_HG = h_prev_TBH.reshape(-1, H).T @ ds_NG
    return dz_TBG, du_HG, dz_NG.sum(0), dq_NH.sum(0), dh_BH, None


gru_scan.defvjp(_forward, _backward)
