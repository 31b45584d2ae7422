"""Rotary position embedding (Su et al. 2021), with the scaling that Llama 3 extends its context by.

Legend: B batch, T positions, H heads, D size of a head, F = D / 2 frequencies.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """How frequencies are lowered for a context longer than the model was first trained on.

    Frequencies that turn fewer than `low` times in `original` positions are divided by `factor`,
    those that turn more than `high` times are left, with a linear passage between (Llama 3.1; the
    published models have `original` 8192, low 1, high 4).

    Attributes:
      factor: how much longer the context is; 1 scales nothing.
      low: turns below which a frequency is divided by `factor`.
      high: turns above which it is left.
      original: positions of the context before.
    """

    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192


def frequencies(size: int, theta: float, scaling: RotaryScaling | None = None) -> np.ndarray:
    """Returns the angles by which a position turns each pair of a head, float32 [size / 2].

    `theta ** (-2 i / size)` for pair i (Su et al. 2021, eq. 15), then scaled.

    Args:
      size: D, even.
      theta: base of the frequencies: 10,000 in the paper, 500,000 in Llama 3.
      scaling: for a longer context.
    """
    frequency_F = theta ** (-np.arange(0, size, 2) / size)
    if scaling is not None:
        turns_F = scaling.original * frequency_F / (2 * math.pi)
        kept_F = np.clip((turns_F - scaling.low) / (scaling.high - scaling.low), 0, 1)
        frequency_F = frequency_F * (kept_F + (1 - kept_F) / scaling.factor)
    return frequency_F.astype(np.float32)


def rotation(position_BT: jax.Array, frequency_F: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Returns cosine and sine of every position's angles, float32 [B, T, 1, F] each."""
    angle_BTF = position_BT[..., None].astype(jnp.float32) * jnp.asarray(frequency_F)[None, None]
    return jnp.cos(angle_BTF)[:, :, None], jnp.sin(angle_BTF)[:, :, None]


def rotate(x_BTHD: jax.Array, turned: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair of a head's coordinates by the angles of its position, in float32.

    Pair i is the coordinates i and i + D / 2, as in GPT-NeoX and in Llama's weights as Hugging
    Face keeps them. The result has the type of `x_BTHD`.

    Args:
      x_BTHD: queries or keys.
      turned: what `rotation` gave; its batch may be 1.
    """
    cos, sin = turned
    first, second = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
    both = first * cos - second * sin, second * cos + first * sin
    return jnp.concatenate(both, axis=-1).astype(x_BTHD.dtype)
