"""Which chunks of a sequence each device of a ring holds, and which pairs of chunks it computes.

Legend: N devices of the ring, C chunks a device holds, n = N * C chunks of the sequence.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.arguments import Spec

Layout = Literal['contiguous', 'zigzag']
LAYOUTS: tuple[Layout, ...] = ('contiguous', 'zigzag')


def chunks(layout: Layout, devices: int) -> np.ndarray:
    """Returns int [N, C]: the chunks of the sequence that each device holds, in their order.

    'contiguous' gives device i chunk i. 'zigzag' cuts the sequence in 2 N and gives it the chunks
    i and 2 N - 1 - i: of a causal mask's triangle every device then has the same share, at every
    step of the ring (Grattafiori et al. 2024, "The Llama 3 Herd of Models", section 3.3.2).
    """
    first = np.arange(devices)[:, None]
    return first if layout == 'contiguous' else np.hstack([first, 2 * devices - 1 - first])


def zigzag(x: jax.Array, devices: int, *, axis: int = 1) -> jax.Array:
    """Returns `x` with its sequence in the order of the zigzag layout.

    Everything that has a position goes the same way: tokens, labels, positions (so that rotary
    embeddings see the true ones), segment ids, both last dimensions of a mask or bias. Done once to
    a batch, it costs the layers nothing.

    Args:
      x: any array.
      devices: size of the context axis.
      axis: the dimension of positions, a multiple of `2 * devices`.

    Raises:
      ValueError: the dimension does not divide.
    """
    return _permute(x, chunks('zigzag', devices).ravel(), axis)


def unzigzag(x: jax.Array, devices: int, *, axis: int = 1) -> jax.Array:
    """Returns `x` with its sequence back in its own order: the inverse of `zigzag`."""
    return _permute(x, np.argsort(chunks('zigzag', devices).ravel()), axis)


def _permute(x: jax.Array, order: np.ndarray, axis: int) -> jax.Array:
    length, parts = x.shape[axis], len(order)
    if length % parts:
        good = max(1, round(length / parts)) * parts
        raise ValueError(
            f'x.shape[{axis}]={length}: must be a multiple of {parts}, two chunks for each of '
            f'{parts // 2} devices; try {good}'
        )
    axis %= x.ndim
    split = jnp.reshape(x, (*x.shape[:axis], parts, length // parts, *x.shape[axis + 1 :]))
    return jnp.take(split, order, axis=axis).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class Route:
    """What a ring does, known before it runs.

    At step r, device i holds the keys and values of device `(i - first - r) % N`.
    """

    chunks_NC: np.ndarray
    seen_nn: np.ndarray  # whether chunk a of queries sees anything of chunk b of keys
    first: int
    steps: int

    def pairs(self) -> np.ndarray:
        """Returns int [steps, N]: how many pairs of chunks each device computes at each step."""
        devices = len(self.chunks_NC)
        held = _between_devices(self.chunks_NC, self.seen_nn)
        owners = (np.arange(devices)[None] - self.first - np.arange(self.steps)[:, None]) % devices
        return held[np.arange(devices)[None], owners]


def route(spec: Spec, layout: Layout, devices: int, queries: int, keys: int) -> Route:
    """Returns the route of a ring that visits no more devices than somebody sees.

    Args:
      spec: what is static; its shift is that of the whole sequence.
      layout: how the sequence lies on the devices.
      devices: size of the context axis.
      queries: number of queries on one device.
      keys: number of keys on one device.
    """
    chunks_NC = chunks(layout, devices)
    count, per_device = chunks_NC.size, chunks_NC.shape[1]
    t, s = queries // per_device, keys // per_device
    first_a1 = np.arange(count)[:, None] * t + spec.shift
    first_1b = np.arange(count)[None] * s
    seen_nn = np.ones((count, count), bool)
    if spec.right is not None:
        seen_nn &= first_1b <= first_a1 + t - 1 + spec.right
    if spec.left is not None:
        seen_nn &= first_1b + s - 1 >= first_a1 - spec.left
    offsets = np.subtract.outer(np.arange(devices), np.arange(devices)) % devices
    needed = np.unique(offsets[_between_devices(chunks_NC, seen_nn) > 0])
    first, steps = _interval(needed, devices)
    return Route(chunks_NC, seen_nn, first, steps)


def _between_devices(chunks_NC: np.ndarray, seen_nn: np.ndarray) -> np.ndarray:
    """Returns int [N, N]: how many pairs of chunks are seen of queries here and keys there."""
    devices, count = chunks_NC.shape
    held = chunks_NC.ravel()
    seen = seen_nn[held[:, None], held[None]].reshape(devices, count, devices, count)
    return seen.sum((1, 3))


def _interval(needed: np.ndarray, devices: int) -> tuple[int, int]:
    """Returns start and length of the shortest run of offsets, around the ring, with all needed."""
    if not needed.size:
        return 0, 0
    gaps = np.diff(needed, append=needed[0] + devices)
    # The run starts behind the widest gap; of equal ones the last, which makes it start at 0.
    widest = len(gaps) - 1 - int(np.argmax(gaps[::-1]))
    return int(needed[(widest + 1) % len(needed)]), devices - int(gaps[widest]) + 1
