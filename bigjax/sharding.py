"""Shardings: where parameters, activations and batches lie on the mesh.

Models describe their parameters by logical axes (`'embed'`, `'heads'`, …) in ordered rules, and
their activations likewise; this file maps those names to mesh axes and turns a whole train state
into shardings. With `bigjax.mesh`, the one place where names of mesh axes are known.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from bigjax.mesh import AXES as AXES
from bigjax.mesh import BATCH_AXES as BATCH_AXES
from bigjax.mesh import make_mesh as make_mesh
from bigjax.mesh import mesh_text
from bigjax.mesh import parse_mesh as parse_mesh
from bigjax.run import UsageError

LOGICAL_TO_MESH = {
    'embed': 'fsdp',
    'heads': 'tensor',
    'mlp': 'tensor',
    'vocab': 'tensor',
    'channels': 'tensor',
    'experts': 'expert',
    'layers': 'stage',
}
# What a model may say of an activation's dimension. 'sequence' holds between the blocks of a
# transformer, where norms need no other position; 'length' within them. 'examples' are
# the batch outside a pipeline, where else all stages would compute the same.
ACTIVATIONS = {
    'batch': BATCH_AXES,
    'examples': (*BATCH_AXES, 'stage'),
    'expert_rows': ('data', 'fsdp'),  # of the batch, at an expert
    'sequence': ('context', 'tensor'),
    'length': ('context',),
    'heads': ('tensor',),
    'mlp': ('tensor',),
    'vocab': ('tensor',),
    'embed': ('fsdp',),
    'experts': ('expert',),
    'stages': ('stage',),
    'width': ('tensor',),  # where positions stay whole: of what experts read and give
}

# What a model must have, or devices along such an axis would all compute the same.
_SHARED = {
    'stage': 'scanned layers (--scan)',
    'expert': 'experts',
    'tensor': 'heads, hidden layers, channels or a vocabulary',
}

Rule = tuple[str, tuple[str | None, ...] | str]


def path_string(path: tuple[Any, ...]) -> str:
    """Returns a pytree key path as `'a/b/0'`."""
    return jax.tree_util.keystr(path, simple=True, separator='/')


def _largest(shape: tuple[int, ...], size: int) -> tuple[str | None, ...]:
    """The default FSDP rule: the largest dimension that divides, else nothing is split."""
    divisible = [d for d, n in enumerate(shape) if n % size == 0]
    best = max(divisible, key=lambda d: shape[d], default=None)
    return tuple('embed' if d == best else None for d in range(len(shape)))


def logical_axes(
    path: str, shape: tuple[int, ...], rules: Sequence[Rule], fsdp: int
) -> tuple[str | None, ...]:
    """Returns the logical axes of one parameter: by the first rule whose regex is in its path.

    Args:
      path: the parameter's path, `'block_0/attention/qkv/kernel'`.
      shape: its shape.
      rules: ordered (regex, logical axis per dimension or `'largest'`).
      fsdp: what `'largest'` must divide by.

    Raises:
      UsageError: no rule matches, or a rule has the wrong rank or an unknown axis.
    """
    rule = next((rule for rule in rules if re.search(rule[0], path)), None)
    if rule is None:
        raise UsageError(
            f'parameter {path!r} matches no sharding rule; add (r"{path}", …) to the RULES of its '
            f"model, or end them with ('.*', 'largest')"
        )
    pattern, axes = rule
    names = _largest(shape, fsdp) if axes == 'largest' else axes
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
    return names


def parameter_specs(
    shapes: Mapping[str, tuple[int, ...]], rules: Sequence[Rule], mesh: Mesh
) -> dict[str, PartitionSpec]:
    """Returns the PartitionSpec of every parameter.

    Args:
      shapes: the shape of each parameter by its path.
      rules: as in `logical_axes`.
      mesh: gives the sizes that dimensions must divide by.

    Raises:
      UsageError: as in `logical_axes`, or a dimension does not divide; the message names the mesh
        nearest to this one that divides all of them.
    """
    named = {p: logical_axes(p, shape, rules, mesh.shape['fsdp']) for p, shape in shapes.items()}
    # The largest size of an axis, at most what it is now, that divides all there is to divide.
    fits, wrong = dict(mesh.shape), ''
    for path, names in named.items():
        for size, name in zip(shapes[path], names, strict=True):
            axis = LOGICAL_TO_MESH.get(name or '', '')
            if axis and size % mesh.shape[axis]:
                fits[axis] = math.gcd(size, fits[axis])
                wrong = wrong or (
                    f'{axis}={mesh.shape[axis]} does not divide the {size} {name} of parameter '
                    f'{path!r}'
                )
    if wrong:
        good = mesh_text({**fits, 'data': -1})
        raise UsageError(f'--mesh={mesh_text(mesh.shape)}: {wrong}; try --mesh={good}')
    return {
        path: PartitionSpec(*(name and LOGICAL_TO_MESH[name] for name in names))
        for path, names in named.items()
    }


def spec_for(path: str, shape: tuple[int, ...], rules: Sequence[Rule], mesh: Mesh) -> PartitionSpec:
    """Returns the PartitionSpec of one parameter, see `parameter_specs`."""
    return parameter_specs({path: shape}, rules, mesh)[path]


def state_shardings(state: Any, rules: Sequence[Rule], mesh: Mesh) -> Any:
    """Returns a tree of NamedSharding for an abstract train state with a `params` field.

    A leaf elsewhere in the state (a moment, an average) whose path ends in a parameter's path and
    which has its shape is placed like that parameter; everything else is replicated.

    Raises:
      UsageError: as in `parameter_specs`, or a model has nothing that an axis of the mesh
        shares out.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    shapes = {path_string(path): leaf.shape for path, leaf in leaves}
    specs = parameter_specs(shapes, rules, mesh)
    for axis, what in _SHARED.items():
        if mesh.shape[axis] > 1 and not any(axis in spec for spec in specs.values()):
            raise UsageError(
                f'--mesh={mesh_text(mesh.shape)}: {axis}={mesh.shape[axis]} shares out {what}, and '
                f'this model has none; try --mesh={mesh_text({**mesh.shape, axis: 1, "data": -1})}'
            )

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        parts = path_string(path).split('/')
        suffixes = ('/'.join(parts[i:]) for i in range(len(parts)))
        spec = next((specs[s] for s in suffixes if shapes.get(s) == leaf.shape), PartitionSpec())
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, state)


def activation_spec(
    names: Sequence[str | None], shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """Returns where an activation lies whose dimensions have these names of `ACTIVATIONS`.

    Only axes that the compiler places and that are larger than 1 are named, and of those of one
    dimension as many, from the first, as divide it.

    Raises:
      ValueError: not one name per dimension, or an unknown one.
    """
    if len(names) != len(shape) or not all(name in (None, *ACTIVATIONS) for name in names):
        raise ValueError(
            f'names {names} of an array {list(shape)}: must be one of {", ".join(ACTIVATIONS)} or '
            f'None per dimension'
        )
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    spec: list[tuple[str, ...] | None] = []
    for name, size in zip(names, shape, strict=True):
        axes: tuple[str, ...] = ()
        for axis in ACTIVATIONS[name] if name else ():
            parts = math.prod(mesh.shape[a] for a in axes) * mesh.shape.get(axis, 1)
            if mesh.shape.get(axis, 1) > 1 and kinds[axis] == AxisType.Auto and size % parts == 0:
                axes = (*axes, axis)
        spec.append(axes or None)
    return PartitionSpec(*spec)


def batch_part(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """Returns which part of every batch a process reads, and how many parts there are.

    Processes whose devices hold the same rows, as those of one `tensor` group do, read the same.

    Args:
      mesh: the mesh.
      process: its number; None is this one.

    Raises:
      UsageError: two processes hold some rows in common, but not all.
    """
    where = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    rows: dict[int, set[int]] = {}
    places: Mapping[Any, Any] = where.devices_indices_map((mesh.size,))
    for device, (part,) in places.items():
        rows.setdefault(device.process_index, set()).add(part.start or 0)
    parts = sorted({tuple(sorted(part)) for part in rows.values()})
    if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) > len(set().union(*parts)):
        raise UsageError(
            f'--mesh={mesh_text(mesh.shape)}: the rows of a batch on one process must be those of '
            f'another or others, not some of them; try --mesh=data=-1'
        )
    mine = jax.process_index() if process is None else process
    return parts.index(tuple(sorted(rows[mine]))), len(parts)


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
    """Returns the bytes one device holds of an abstract tree, its share of the host's left out."""

    def size(x: Any, where: NamedSharding) -> int:
        on_host = where.memory_kind not in (None, 'device')
        return 0 if on_host else math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(size, state, shardings)))
