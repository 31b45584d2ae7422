"""Context parallelism: in which order a sequence lies on the devices that share its positions.

With causal attention the last positions have most to do. So a sequence is cut into two chunks for
each device, of which it holds one from the front and one from the back: zig-zag order. Tokens and
targets are put in it once, where a batch comes in; positions follow, and no layer needs to know.
"""

import jax
import numpy as np

from bigjax.mesh import mesh_text
from bigjax.run import UsageError
from bigjax.sharding import ACTIVATIONS
from pallas_kernels.attention.layouts import chunks, zigzag

(CONTEXT,) = ACTIVATIONS['length']


def context_size() -> int:
    """Returns how many devices share the positions of a sequence, on the mesh that is set."""
    return jax.sharding.get_abstract_mesh().shape.get(CONTEXT, 1)


def refusal() -> UsageError:
    """Returns the error of a model that needs all positions, on a mesh that splits them."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return UsageError(
        f'--mesh={mesh_text(sizes)}: only decoder-only transformers split positions over '
        f'{CONTEXT}; try --mesh={mesh_text({**sizes, CONTEXT: 1, "data": -1})}'
    )


def sequence_order(length: int) -> np.ndarray | None:
    """Returns which position lies at each place of a sequence; None where all are in order.

    What is drawn by place, such as dropout, is then drawn for other positions than in order.

    Args:
      length: T, positions.

    Returns:
      int [T], on a mesh that is set and splits positions.

    Raises:
      UsageError: the length is not two equal chunks a device.
    """
    devices = context_size()
    if devices == 1:
        return None
    parts = 2 * devices
    if length % parts:
        mesh = mesh_text(jax.sharding.get_abstract_mesh().shape)
        good = max(1, round(length / parts)) * parts
        raise UsageError(
            f'--seq={length}: must be a multiple of {parts}, two chunks for each of the {devices} '
            f'parts of a sequence on --mesh={mesh}; try --seq={good}'
        )
    return np.arange(length).reshape(parts, -1)[chunks('zigzag', devices).ravel()].ravel()


def laid_out(x: jax.Array, *, axis: int = 1) -> jax.Array:
    """Returns what has a value for each position, in order, as `sequence_order` says.

    Args:
      x: any array.
      axis: its dimension of positions.

    Raises:
      UsageError: as `sequence_order`.
    """
    return x if sequence_order(x.shape[axis]) is None else zigzag(x, context_size(), axis=axis)
