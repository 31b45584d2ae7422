"""Loading: from files straight into sharded arrays, one shard of one leaf at a time."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from bigjax.pretrained.files import Index, Weights, itemsize, pieces
from bigjax.pretrained.layout import Placed
from bigjax.pretrained.match import Match


def load(
    weights: Weights,
    match: Match,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, jax.sharding.Sharding],
) -> dict[str, jax.Array]:
    """Returns `{path: array}` of every leaf that the file fills.

    At any time the host holds one shard of one leaf, and a few megabytes of a file; every process
    reads only what its own devices hold.

    Args:
      weights: the folder or file.
      match: what goes where.
      abstract: shape and dtype of every leaf by its path; values are cast.
      shardings: where it will live.
    """
    return {
        path: _array(weights, parts, match.names, abstract[path], shardings[path])
        for path, parts in match.parts.items()
    }


def _array(
    weights: Weights,
    parts: list[Placed],
    names: Mapping[str, str],
    leaf: jax.ShapeDtypeStruct,
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    """Not jax.make_array_from_callback, which holds all shards, and each as often as it is used."""
    devices: dict[Any, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        assert index is not None  # none of these devices is another process's
        whole = zip(index, leaf.shape, strict=True)
        bounds = tuple(axis.indices(size)[:2] for axis, size in whole)
        devices.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, holders in devices.items():
        shard = _shard(weights, parts, names, leaf, tuple(slice(*b) for b in bounds))
        arrays += jax.block_until_ready([jax.device_put(shard, device) for device in holders])
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def _shard(
    weights: Weights,
    parts: list[Placed],
    names: Mapping[str, str],
    leaf: jax.ShapeDtypeStruct,
    index: Index,
) -> np.ndarray:
    """Returns one shard of a leaf."""
    shape = tuple(axis.stop - axis.start for axis in index)
    shard = np.empty(shape, leaf.dtype)
    for part in parts:
        fill(shard, index, weights, part, names)
    return shard


def fill(
    shard: np.ndarray, index: Index, weights: Weights, part: Placed, names: Mapping[str, str]
) -> None:
    """Reads what `part` gives to `shard`, which is the block `index` of our leaf."""
    name = names[part.rule.theirs]
    into = list(range(shard.ndim))
    for axis, i in sorted(part.rule.at, reverse=True):
        if not index[axis].start <= i < index[axis].stop:
            return
        shard = shard[(*(slice(None),) * axis, i - index[axis].start, ...)]
        del into[axis]
    wanted = tuple(
        own if axis is None else index[axis]
        for own, axis in zip(part.wanted, part.order, strict=True)
    )
    ours = [axis for axis in part.order if axis is not None]
    size = itemsize(weights.tensors[name])
    for stored, block in pieces(part.sizes, wanted, list(part.groups), size):
        value = weights.read(name, stored)
        kept = zip(block, part.order, strict=True)
        value = value.reshape([b.stop - b.start for b, axis in kept if axis is not None])
        value = value.transpose([ours.index(axis) for axis in into])
        where = dict(zip(part.order, block, strict=True))
        target = (slice(where[a].start - index[a].start, where[a].stop - index[a].start)
                  for a in into)  # fmt: skip
        shard[tuple(target)] = value
