"""Recurrent layers over time: the LSTM, one or both directions, exact on padded sequences.

Shape legend: B batch, T time, C input features, H state features of one direction, G = 4H gates
in the order (input, forget, cell, output), K output features (H, or 2H for both directions).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Direction = Literal['forward', 'reverse', 'both']


class LSTMState(NamedTuple):
    """What a step hands on: `h` [B, K] in the compute type, `c` [B, K] float32 or wider.

    With two directions the halves of K are (forward, reverse), as they are in the outputs.
    """

    h: Array
    c: Array


def length_mask(lengths_B: Array, max_length: int) -> Array:
    """True [B, max_length] for the first `lengths_B` (int32) steps of each row."""
    return jnp.arange(max_length)[None, :] < lengths_B[:, None]


def _gates(a_BG: Array) -> Array:
    """The four gates' values, in one pass: sigmoid(x) = (1 + tanh(x/2)) / 2."""
    H = a_BG.shape[-1] // 4
    scale_G = jnp.repeat(jnp.array([0.5, 0.5, 1.0, 0.5], a_BG.dtype), H)[None]
    return scale_G * jnp.tanh(scale_G * a_BG) + (1 - scale_G)


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


def _forward(z_TBG, u_HG, b_G, h0_BH, c0_BH, mask_TB, reverse):
    T = z_TBG.shape[0]

    def step(n, carry):
        h_BH, c_BH, gates_TBG, h_TBH, c_prev_TBH = carry
        t = T - 1 - n if reverse else n
        gates_BG = _gates(gates_TBG[t] + h_BH @ u_HG + b_G[None])
        i, f, g, o = jnp.split(gates_BG, 4, axis=-1)
        new_c = f * c_BH + i * g
        new_h = (o * jnp.tanh(new_c)).astype(h_BH.dtype)
        if mask_TB is not None:
            mask_B1 = mask_TB[t][:, None]
            new_h = jnp.where(mask_B1, new_h, h_BH)
            new_c = jnp.where(mask_B1, new_c, c_BH)
        saved = (_put(gates_TBG, gates_BG, t), _put(h_TBH, new_h, t), _put(c_prev_TBH, c_BH, t))
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
        dh_BH, dc_BH, dz_TBG = carry
        t = n if reverse else T - 1 - n
        # The barrier makes one copy of the slice. Without it XLA reads the slice anew wherever it
        # is used, and so must copy the whole buffer before it may overwrite any of it.
        i, f, g, o = jnp.split(lax.optimization_barrier(dz_TBG[t]), 4, axis=-1)
        c_prev_BH = c_prev_TBH[t]
        dh_BH = dh_BH + dy_TBH[t]
        kept_h, kept_c = 0, 0
        if mask_TB is not None:
            mask_B1 = mask_TB[t][:, None]
            kept_h, kept_c = jnp.where(mask_B1, 0, dh_BH), jnp.where(mask_B1, 0, dc_BH)
            dh_BH, dc_BH = jnp.where(mask_B1, dh_BH, 0), jnp.where(mask_B1, dc_BH, 0)
        tanh_c = jnp.tanh(f * c_prev_BH + i * g)
        dc_BH = dc_BH + dh_BH * o * (1 - tanh_c * tanh_c)
        da = (
            dc_BH * g * i * (1 - i),
            dc_BH * c_prev_BH * f * (1 - f),
            dc_BH * i * (1 - g * g),
            dh_BH * tanh_c * o * (1 - o),
        )
        dz_BG = jnp.concatenate(da, axis=-1).astype(u_GH.dtype)
        return dz_BG @ u_GH + kept_h, dc_BH * f + kept_c, _put(dz_TBG, dz_BG, t)

    dh_BH, dc_BH, dz_TBG = lax.fori_loop(0, T, step, (dh_BH, dc_BH, gates_TBG))
    parts = [h_TBH[1:], h0_BH[None]] if reverse else [h0_BH[None], h_TBH[:-1]]
    h_prev_NH = jnp.concatenate(parts).reshape(-1, G // 4)
    dz_NG = dz_TBG.reshape(-1, G)
    return dz_TBG, h_prev_NH.T @ dz_NG, dz_NG.sum(0), dh_BH, dc_BH, None


def _put(buffer_TBX: Array, value_BX: Array, t: Array) -> Array:
    return lax.dynamic_update_index_in_dim(buffer_TBX, value_BX.astype(buffer_TBX.dtype), t, 0)


lstm_scan.defvjp(_forward, _backward)


def _recurrent_init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """One orthogonal [H, H] matrix for each of the four gates, side by side."""
    square = nn.initializers.orthogonal()
    keys = jax.random.split(key, 4)
    return jnp.concatenate([square(k, (shape[0], shape[0]), dtype) for k in keys], axis=-1)


def _bias_init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Zero but for the forget gates, which start open (Jozefowicz et al., 2015)."""
    del key
    return jnp.zeros((4, shape[0] // 4), dtype).at[1].set(1).reshape(shape)


class LSTM(nn.Module):
    """A long short-term memory layer.

    The parameters of a direction d are float32 and lie in `{d}_kernel` [C, 4H],
    `{d}_recurrent_kernel` [H, 4H] and `{d}_bias` [4H], gates in PyTorch's order.

    Attributes:
        features: H, state features of one direction.
        direction: 'forward', 'reverse' (from the last step to the first), or 'both', side by side.
        time_major: whether inputs and outputs are [T, B, …] instead of [B, T, …].
        dtype: type of the matrix products and of the outputs; the cell state is never narrower
            than float32.
        kernel_init: initialiser of the input kernel.
    """

    features: int
    direction: Direction = 'forward'
    time_major: bool = False
    dtype: Any = jnp.float32
    kernel_init: Callable[..., Array] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(
        self,
        x_BTC: Array,
        *,
        tokens_BT: Array | None = None,
        mask_BT: Array | None = None,
        state: LSTMState | None = None,
    ) -> tuple[Array, LSTMState]:
        """Returns the outputs [B, T, K] in `dtype` and the state after each direction's last step.

        With `tokens_BT` (int32, in range), `x_BTC` is a table [V, C] and step inputs are its rows:
        the same as looking them up first, but a table shorter than B·T is projected instead of
        them. A step whose `mask_BT` (bool) is False leaves the state as it is, and the output
        there repeats it. `state` is the state before the first step, zero if absent. Time comes
        first in `x_BTC`, `tokens_BT`, `mask_BT` and the outputs if `time_major`. Raises ValueError
        on an unknown direction.
        """
        if self.direction not in ('forward', 'reverse', 'both'):
            raise ValueError(
                f'direction={self.direction!r}: must be forward, reverse or both; try forward'
            )
        x = jnp.asarray(x_BTC) if tokens_BT is not None else self._time_first(x_BTC)
        tokens_TB = None if tokens_BT is None else self._time_first(tokens_BT)
        mask_TB = None if mask_BT is None else self._time_first(mask_BT)
        if tokens_TB is not None and x.shape[0] >= tokens_TB.size:
            x, tokens_TB = x[tokens_TB], None
        directions = ('forward', 'reverse') if self.direction == 'both' else (self.direction,)
        if state is None:
            batch = x.shape[1] if tokens_TB is None else tokens_TB.shape[1]
            state = self.initial_state(batch)
        h0s = jnp.split(state.h.astype(self.dtype), len(directions), axis=-1)
        c0s = jnp.split(state.c, len(directions), axis=-1)
        runs = []
        for name, h0_BH, c0_BH in zip(directions, h0s, c0s, strict=True):
            kernel_CG, recurrent_HG, bias_G = self._parameters(name, x.shape[-1])
            # One product for all steps, on two dimensions: XLA's CPU gradient of a product with a
            # three-dimensional operand is half as fast.
            z_NG = x.reshape(-1, x.shape[-1]).astype(self.dtype) @ kernel_CG
            if tokens_TB is None:
                z_TBG = z_NG.reshape(*x.shape[:2], -1)
            else:
                z_TBG = z_NG[tokens_TB]
            is_reverse = name == 'reverse'
            runs.append(lstm_scan(z_TBG, recurrent_HG, bias_G, h0_BH, c0_BH, mask_TB, is_reverse))
        y_TBK, h_BK, c_BK = (jnp.concatenate(parts, axis=-1) for parts in zip(*runs, strict=True))
        return self._time_first(y_TBK), LSTMState(h_BK, c_BK)

    def initial_state(self, batch: int) -> LSTMState:
        """The zero state of `batch` rows."""
        shape = (batch, self.features * (2 if self.direction == 'both' else 1))
        c_type = jnp.promote_types(self.dtype, jnp.float32)
        return LSTMState(jnp.zeros(shape, self.dtype), jnp.zeros(shape, c_type))

    def _time_first(self, x: Array) -> Array:
        """Exchanges the first two dimensions, its own inverse, unless time is first throughout."""
        return jnp.asarray(x) if self.time_major else jnp.swapaxes(x, 0, 1)

    def _parameters(self, direction: str, inputs: int) -> tuple[Array, Array, Array]:
        # The parameters widen with the compute type, so that float64 can check the gradient.
        param_type = jnp.promote_types(self.dtype, jnp.float32)
        H, G = self.features, 4 * self.features
        kernel_CG = self.param(f'{direction}_kernel', self.kernel_init, (inputs, G), param_type)
        u_HG = self.param(f'{direction}_recurrent_kernel', _recurrent_init, (H, G), param_type)
        b_G = self.param(f'{direction}_bias', _bias_init, (G,), param_type)
        return kernel_CG.astype(self.dtype), u_HG.astype(self.dtype), b_G.astype(self.dtype)
