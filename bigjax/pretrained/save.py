"""Saving: a model's leaves gathered one tensor at a time and written as another library does."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from bigjax.pretrained.layout import Layout, Placed, place, resolve
from bigjax.pretrained.write import Writer
from bigjax.run import UsageError


def save(
    folder: Path, layout: Layout, leaves: Mapping[str, jax.Array], max_bytes: int
) -> tuple[int, int]:
    """Writes `leaves` in a layout, float32; returns the numbers of tensors and of bytes.

    To be called by all processes; the first one writes.

    Args:
      folder: where to; made if it is not there.
      layout: names, shapes and config.json.
      leaves: {path: array}.
      max_bytes: of one file.

    Raises:
      UsageError: a leaf has no place in the layout.
    """
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    placed: dict[str, list[Placed]] = {}
    for rule in resolve(layout.rules, shapes):
        if rule.ours in leaves:
            placed.setdefault(rule.theirs, []).append(place(rule, shapes[rule.ours]))
    covered = {part.rule.ours for parts in placed.values() for part in parts}
    if lost := [path for path in leaves if path not in covered]:
        raise UsageError(
            f'--action=export: {layout.name} has no place for {", ".join(lost[:5])}'
            f'{" …" if len(lost) > 5 else ""}; only models with no knob that it lacks are exported'
        )
    sizes = {name: 4 * int(np.prod(parts[0].shape())) for name, parts in placed.items()}
    first = jax.process_index() == 0
    writer = Writer(folder, sizes, max_bytes) if first else None
    for name, parts in placed.items():
        value = _tensor(parts, leaves)
        if writer:
            writer.add(name, value)
    if writer:
        writer.finish(layout.config)
    return len(sizes), sum(sizes.values())


def _tensor(parts: list[Placed], leaves: Mapping[str, jax.Array]) -> np.ndarray:
    """Returns one tensor of theirs, put together from the parts of our leaves that make it."""
    value = np.empty(parts[0].shape(), np.float32)
    for part in parts:
        leaf, at = leaves[part.rule.ours], dict(part.rule.at)
        if 0 in at:
            # Of a leaf that holds all layers, only one is gathered.
            leaf, at = _row(leaf, at[0]), {**at, 0: 0}
        ours = _host(leaf)
        ours = ours[tuple(at.get(axis, slice(None)) for axis in range(ours.ndim))]
        kept = [axis for axis in part.order if axis is not None]
        ours = ours.transpose([sorted(kept).index(axis) for axis in kept])
        block = value.reshape(part.sizes)[part.wanted]
        block[...] = ours.reshape(block.shape)
    return value


@jax.jit
def _row(leaf: jax.Array, i: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, i, 0)


def _host(leaf: jax.Array) -> np.ndarray:
    if leaf.is_fully_addressable:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
