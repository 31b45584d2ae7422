"""Recurrent layers: Elman, LSTM or GRU, one or both directions, exact on padded sequences.

Shape legend: B batch, T time, C input features, H state features of one direction, G gate features
(H, 4H or 3H: see elman.py, lstm.py, gru.py), K output features (H, or 2H for both directions),
V rows of a table, N = T·B or V.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigjax.nn.elman import elman_scan
from bigjax.nn.gru import gru_scan
from bigjax.nn.lstm import lstm_scan

Array = jax.Array
Cell = Literal['elman', 'lstm', 'gru']
Direction = Literal['forward', 'reverse', 'both']
GATES = {'elman': 1, 'lstm': 4, 'gru': 3}


class RecurrentState(NamedTuple):
    """What a step hands on: `h` [B, K] in the compute type; of an LSTM also `c` [B, K].

    `c` is float32 or wider. With two directions the halves of K are (forward, reverse), as they
    are in the outputs.
    """

    h: Array
    c: Array | None = None


def length_mask(lengths_B: Array, max_length: int) -> Array:
    """True [B, max_length] for the first `lengths_B` (int32) steps of each row."""
    return jnp.arange(max_length)[None, :] < lengths_B[:, None]


def zero_state(
    batch: int, features: int, *, cell: Cell = 'lstm', dtype: Any = jnp.float32
) -> RecurrentState:
    """The state of `batch` rows that have read nothing, with K = `features`."""
    h_BK = jnp.zeros((batch, features), dtype)
    if cell != 'lstm':
        return RecurrentState(h_BK)
    return RecurrentState(h_BK, h_BK.astype(jnp.promote_types(dtype, jnp.float32)))


class Recurrent(nn.Module):
    """A recurrent layer.

    The parameters of a direction d are float32 and lie in `{d}_kernel` [C, G],
    `{d}_recurrent_kernel` [H, G] and `{d}_bias` [G], gates in PyTorch's order, with PyTorch's two
    biases in one. Only a GRU's candidate keeps the second apart, in `{d}_recurrent_bias` [H],
    since the reset gate acts on it.

    Attributes:
        features: H, state features of one direction.
        cell: 'elman' (tanh), 'lstm' or 'gru'.
        direction: 'forward', 'reverse' (from the last step to the first), or 'both', side by side.
        time_major: whether inputs and outputs are [T, B, …] instead of [B, T, …].
        dtype: type of the matrix products and of the outputs; an LSTM's cell state is never
            narrower than float32.
        kernel_init: initialiser of the input kernel.
    """

    features: int
    cell: Cell = 'lstm'
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
        state: RecurrentState | None = None,
    ) -> tuple[Array, RecurrentState]:
        """Returns the outputs [B, T, K] in `dtype` and the state after each direction's last step.

        With `tokens_BT` (int32, in range), `x_BTC` is a table [V, C] and step inputs are its rows:
        the same as looking them up first, but a table shorter than B·T is projected instead of
        them. A step whose `mask_BT` (bool) is False leaves the state as it is, and the output
        there repeats it. `state` is the state before the first step, zero if absent. Time comes
        first in `x_BTC`, `tokens_BT`, `mask_BT` and the outputs if `time_major`. Raises ValueError
        on an unknown cell or direction.
        """
        for name, value, known in (
            ('cell', self.cell, ('elman', 'lstm', 'gru')),
            ('direction', self.direction, ('forward', 'reverse', 'both')),
        ):
            if value not in known:
                first, second, third = known
                raise ValueError(
                    f'{name}={value!r}: must be {first}, {second} or {third}; try {first}'
                )
        x = jnp.asarray(x_BTC) if tokens_BT is not None else self._time_first(x_BTC)
        tokens_TB = None if tokens_BT is None else self._time_first(tokens_BT)
        mask_TB = None if mask_BT is None else self._time_first(mask_BT)
        if tokens_TB is not None and x.shape[0] >= tokens_TB.size:
            x, tokens_TB = x[tokens_TB], None
        directions = ('forward', 'reverse') if self.direction == 'both' else (self.direction,)
        if state is None:
            batch = (x if tokens_TB is None else tokens_TB).shape[1]
            K = self.features * (2 if self.direction == 'both' else 1)
            state = zero_state(batch, K, cell=self.cell, dtype=self.dtype)
        ways, outputs, states = len(directions), [], []
        for place, name in enumerate(directions):
            kernel_CG, weights = self._weights(name, x.shape[-1])
            # One product for all steps, on two dimensions: XLA's CPU gradient of a product with a
            # three-dimensional operand is half as fast.
            z_NG = x.reshape(-1, x.shape[-1]).astype(self.dtype) @ kernel_CG
            if tokens_TB is None:
                z_TBG = z_NG.reshape(*x.shape[:2], -1)
            else:
                z_TBG = z_NG[tokens_TB]
            own = jax.tree.map(lambda s, n=place: jnp.split(s, ways, axis=-1)[n], state)
            y_TBH, after = self._run(z_TBG, weights, own, mask_TB, name == 'reverse')
            outputs.append(y_TBH)
            states.append(after)
        y_TBK = jnp.concatenate(outputs, axis=-1)
        joined = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1), *states)
        return self._time_first(y_TBK), joined

    def _run(
        self,
        z_TBG: Array,
        weights: tuple[Array, ...],
        state: RecurrentState,
        mask_TB: Array | None,
        reverse: bool,
    ) -> tuple[Array, RecurrentState]:
        h_BH = state.h.astype(self.dtype)
        if self.cell == 'lstm':
            y_TBH, *after = lstm_scan(z_TBG, *weights, h_BH, state.c, mask_TB, reverse)
        else:
            scan = gru_scan if self.cell == 'gru' else elman_scan
            y_TBH, *after = scan(z_TBG, *weights, h_BH, mask_TB, reverse)
        return y_TBH, RecurrentState(*after)

    def _time_first(self, x: Array) -> Array:
        """Exchanges the first two dimensions, its own inverse, unless time is first throughout."""
        return jnp.asarray(x) if self.time_major else jnp.swapaxes(x, 0, 1)

    def _weights(self, direction: str, inputs: int) -> tuple[Array, tuple[Array, ...]]:
        """The input kernel of one direction, and what its loop needs, in the compute type."""
        # The parameters widen with the compute type, so that float64 can check the gradient.
        param_type = jnp.promote_types(self.dtype, jnp.float32)
        H, G = self.features, GATES[self.cell] * self.features
        zeros = nn.initializers.zeros_init()
        table = {
            'kernel': (self.kernel_init, (inputs, G)),
            'recurrent_kernel': (_recurrent_init, (H, G)),
            'bias': (_forget_init if self.cell == 'lstm' else zeros, (G,)),
        }
        if self.cell == 'gru':
            table['recurrent_bias'] = (zeros, (H,))
        kernel, *weights = (
            self.param(f'{direction}_{name}', init, shape, param_type).astype(self.dtype)
            for name, (init, shape) in table.items()
        )
        return kernel, tuple(weights)


def _recurrent_init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """One orthogonal [H, H] matrix for each gate, side by side."""
    square = nn.initializers.orthogonal()
    keys = jax.random.split(key, shape[1] // shape[0])
    return jnp.concatenate([square(k, (shape[0], shape[0]), dtype) for k in keys], axis=-1)


def _forget_init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Zero but for the forget gates, which start open (Jozefowicz et al., 2015)."""
    del key
    return jnp.zeros((4, shape[0] // 4), dtype).at[1].set(1).reshape(shape)


class RecurrentStack(nn.Module):
    """Recurrent layers on top of each other, with dropout between them (Zaremba et al., 2014).

    Attributes:
        features: state features of each layer and direction.
        layers: number of layers.
        cell, direction, time_major, dtype: as in `Recurrent`.
        dropout: rate between layers, in training.
    """

    features: int
    layers: int = 1
    cell: Cell = 'lstm'
    direction: Direction = 'forward'
    time_major: bool = False
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def setup(self) -> None:
        options = {'time_major': self.time_major, 'dtype': self.dtype}
        self.layer = [
            Recurrent(self.features, cell=self.cell, direction=self.direction, **options)
            for _ in range(self.layers)
        ]
        self.drop = nn.Dropout(self.dropout)

    def __call__(
        self,
        x_BTC: Array,
        *,
        tokens_BT: Array | None = None,
        mask_BT: Array | None = None,
        states: tuple[RecurrentState, ...] | None = None,
        train: bool = False,
    ) -> tuple[Array, tuple[RecurrentState, ...]]:
        """Returns the last layer's outputs [B, T, K] and every layer's last state.

        The arguments are `Recurrent`'s; `states` holds one a layer. Needs the 'dropout' generator
        when `train` and `dropout` > 0.
        """
        y, after = x_BTC, []
        for n, layer in enumerate(self.layer):
            if n:
                y, tokens_BT = self.drop(y, deterministic=not train), None
            state = None if states is None else states[n]
            y, state = layer(y, tokens_BT=tokens_BT, mask_BT=mask_BT, state=state)
            after.append(state)
        return y, tuple(after)
