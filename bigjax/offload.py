"""The optimizer's state in the host's memory, for --offload=optimizer.

Between steps the moments are no part of what a device holds; a step brings them in, updates them,
and takes them out again: twice their size over the link to the host (Rajbhandari et al. 2021,
ZeRO-Infinity, arXiv:2104.07857, §3, which updates them on the host instead).
"""

from typing import Any

import jax
import optax
from jax.sharding import Mesh

from bigjax.run import UsageError

HOST = 'pinned_host'


def check(mesh: Mesh) -> None:
    """Raises UsageError where the devices cannot read the host's memory within a program."""
    device = mesh.devices.flat[0]
    if HOST not in {memory.kind for memory in device.addressable_memories()}:
        raise UsageError(
            f'--offload=optimizer: {device.device_kind} has no memory of kind {HOST!r}; '
            f'try --offload=none'
        )


def on_host(shardings: Any, abstract: Any) -> Any:
    """Returns the shardings of an optimizer's state with its arrays in the host's memory.

    Scalars, such as a count of steps, stay on the device.
    """
    return jax.tree.map(lambda s, x: s.with_memory_kind(HOST) if x.ndim else s, shardings, abstract)


def offloaded(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns the optimizer for a state that lies as `on_host` says; for use under `jax.jit`."""

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, _moved(state, jax.memory.Space.Device), params)
        return updates, _moved(state, jax.memory.Space.Host)

    return optax.GradientTransformation(optimizer.init, update)


def _moved(state: Any, space: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, state)
