"""Mesh and shardings: the one place where names of mesh axes are known.

Models describe their parameters by logical axes (`'embed'`, `'heads'`, …) in ordered rules; this
file maps those names to mesh axes and turns a whole train state into shardings.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bigjax.experiment import UsageError

AXES = ('data', 'fsdp', 'tensor')
# The batch is split over every axis that holds different examples.
BATCH_AXES = ('data', 'fsdp')
LOGICAL_TO_MESH = {
    'embed': 'fsdp',
    'heads': 'tensor',
    'mlp': 'tensor',
    'vocab': 'tensor',
    'channels': 'tensor',
    'experts': 'tensor',
}

Rule = tuple[str, tuple[str | None, ...] | str]


def parse_mesh(text: str, devices: int, processes: int = 1) -> dict[str, int]:
    """Returns the size of every axis in `AXES` for `text` such as `'data=2,fsdp=-1'`.

    Args:
      text: comma-separated `axis=size`; one size may be -1 (what is left); absent axes are 1.
      devices: number of devices the sizes must multiply to.
      processes: number of processes, each of which reads batch rows of its own.

    Raises:
      UsageError: an unknown or repeated axis, sizes that do not multiply to `devices`, or fewer
        batch shards than processes.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(',')):
        axis, _, size = part.partition('=')
        if axis not in AXES or not re.fullmatch(r'-1|[1-9]\d*', size):
            raise UsageError(
                f'--mesh={text}: {part!r} is not axis=size with an axis of {", ".join(AXES)} and a '
                f'positive size or -1; try --mesh=data=-1'
            )
        if axis in sizes:
            raise UsageError(f'--mesh={text}: axis {axis!r} is given twice; try --mesh=data=-1')
        sizes[axis] = int(size)
    known = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UsageError(f'--mesh={text}: only one axis may be -1; try --mesh=data=-1')
    if devices % known if free else devices != known:
        raise UsageError(
            f'--mesh={text}: the sizes multiply to {known}, which '
            f'{"does not divide" if free else "is not"} the number of devices, {devices}; '
            f'try --mesh=data=-1'
        )
    sizes |= dict.fromkeys(free, devices // known)
    shards = math.prod(sizes.get(axis, 1) for axis in BATCH_AXES)
    if shards % processes:
        raise UsageError(
            f'--mesh={text}: {" * ".join(BATCH_AXES)} is {shards}, which is not a multiple of the '
            f'{processes} processes, each of which reads batch rows of its own; '
            f'try --mesh=data=-1'
        )
    return {axis: sizes.get(axis, 1) for axis in AXES}


def make_mesh(text: str) -> Mesh:
    """Returns a mesh over all devices of all processes, every axis of `AXES` in it.

    Axis types are Auto: Linen layers take no output shardings, so the compiler propagates them.
    """
    sizes = parse_mesh(text, jax.device_count(), jax.process_count())
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _mesh_text(sizes: Mapping[str, int]) -> str:
    return ','.join(f'{axis}={size}' for axis, size in sizes.items() if size != 1)


def path_string(path: tuple[Any, ...]) -> str:
    """Returns a pytree key path as `'a/b/0'`."""
    return jax.tree_util.keystr(path, simple=True, separator='/')


def _largest(shape: tuple[int, ...], size: int) -> tuple[str | None, ...]:
    """The default FSDP rule: the largest dimension that divides, else nothing is split."""
    divisible = [d for d, n in enumerate(shape) if n % size == 0]
    best = max(divisible, key=lambda d: shape[d], default=None)
    return tuple('embed' if d == best else None for d in range(len(shape)))


def spec_for(path: str, shape: tuple[int, ...], rules: Sequence[Rule], mesh: Mesh) -> PartitionSpec:
    """Returns the PartitionSpec of one parameter: the first rule whose regex is found in its path.

    Args:
      path: the parameter's path, `'block_0/attention/qkv/kernel'`.
      shape: its shape.
      rules: ordered (regex, logical axis per dimension or `'largest'`).
      mesh: gives the sizes that dimensions must divide by.

    Raises:
      UsageError: no rule matches, a rule has the wrong rank, or a dimension does not divide.
    """
    rule = next((rule for rule in rules if re.search(rule[0], path)), None)
    if rule is None:
        raise UsageError(
            f'parameter {path!r} matches no sharding rule; add (r"{path}", …) to the RULES of its '
            f"model, or end them with ('.*', 'largest')"
        )
    pattern, axes = rule
    names = _largest(shape, mesh.shape['fsdp']) if axes == 'largest' else axes
    known = (None, *LOGICAL_TO_MESH)
    if isinstance(names, str) or not all(name in known for name in names):
        raise UsageError(
            f'sharding rule {pattern!r} gives {axes!r}; it must be a tuple of '
            f"{', '.join(LOGICAL_TO_MESH)} and None, or 'largest'"
        )
    if len(names) != len(shape):
        raise UsageError(
            f'sharding rule {pattern!r} names {len(names)} dimensions, but parameter {path!r} has '
            f'{len(shape)}; give one logical axis or None per dimension'
        )
    spec = tuple(name and LOGICAL_TO_MESH[name] for name in names)
    for size, name, axis in zip(shape, names, spec, strict=True):
        if axis and size % mesh.shape[axis]:
            good = {**mesh.shape, axis: math.gcd(size, mesh.shape[axis]), 'data': -1}
            raise UsageError(
                f'--mesh={_mesh_text(mesh.shape)}: {axis}={mesh.shape[axis]} does not divide the '
                f'{size} {name} of parameter {path!r}; try --mesh={_mesh_text(good)}'
            )
    return PartitionSpec(*spec)


def state_shardings(state: Any, rules: Sequence[Rule], mesh: Mesh) -> Any:
    """Returns a tree of NamedSharding for an abstract train state with a `params` field.

    A leaf elsewhere in the state (a moment, an average) whose path ends in a parameter's path and
    which has its shape is placed like that parameter; everything else is replicated.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    placed = {path_string(p): (x.shape, spec_for(path_string(p), x.shape, rules, mesh))
              for p, x in leaves}  # fmt: skip

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        parts = path_string(path).split('/')
        suffixes = ('/'.join(parts[i:]) for i in range(len(parts)))
        spec = next((placed[s][1] for s in suffixes if placed.get(s, [None])[0] == leaf.shape),
                    PartitionSpec())  # fmt: skip
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, state)


def batch_sharding(mesh: Mesh, *, stacked: bool = False) -> NamedSharding:
    """Returns the sharding of a batch, rows over `BATCH_AXES`; `stacked` adds a step axis."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * stacked, BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def readable(params: Any) -> NamedSharding | None:
    """Returns the sharding of an output of `params` that every process of the run can read.

    None leaves it to the compiler, where parameters are not spread over a mesh.
    """
    where = jax.tree.leaves(params)[0].sharding
    return where.update(spec=PartitionSpec()) if isinstance(where, NamedSharding) else None


def check_batch(flag: str, batch: int, mesh: Mesh, *, accumulate: int = 1) -> None:
    """Raises UsageError unless every device gets the same number of rows in every microbatch.

    Args:
      flag: name of the flag that gave the batch, for the message.
      batch: rows over all devices.
      mesh: devices.
      accumulate: microbatches of a batch.
    """
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    parts = shards * accumulate
    if batch < 1 or batch % parts:
        times = f' times --accumulate={accumulate}' if accumulate > 1 else ''
        raise UsageError(
            f'--{flag}={batch}: must be a positive multiple of {parts}, the {shards} batch shards '
            f'of the mesh{times}; try --{flag}={max(1, round(batch / parts)) * parts}'
        )


def shard_batch(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Returns this host's rows of a batch as arrays that all hosts own together."""
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }


def bytes_per_device(state: Any, shardings: Any) -> int:
    """Returns the bytes one device holds of an abstract tree under `shardings`."""
    sizes = jax.tree.map(
        lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, state, shardings
    )
    return sum(jax.tree.leaves(sizes))
