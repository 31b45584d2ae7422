"""Sums over a batch whose bits do not depend on how many devices share it (`--deterministic`).

A batch is cut into `SHARDS` logical shards, rows in order. Every one is computed by itself, by the
same program whichever device holds it, and their results are added over one fixed binary tree:
((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)). A device adds up the shards it holds; then each pair of
devices whose numbers differ in one bit exchange and add, lowest bit first. Addition is commutative,
so both get the same bits, and no backend chooses an order of its own.

Losses, gradients, weights and the metrics of evaluation are such sums. Predictions are none: scores
made of them (BLEU, spans' F1), and generated texts, may differ between numbers of devices where two
outcomes are nearly alike.

Of a small CNN a step took 1.3 to 1.4 times as long on one device and 0.6 times on eight, of a small
GPT 1.05 to 1.1 times on one and 1.4 to 2.1 on eight, which two cores shared (`python
tests/deterministic_cost.py`, medians of 21 steps each way in turn, three or four runs).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from bigjax.mesh import BATCH_AXES, mesh_text
from bigjax.run import Run, UsageError
from bigjax.task import Batch
from pallas_kernels.chip import accelerator

SHARDS = 8


def sum_over_shards(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `(batch, key, *shared) -> tree`, the sum of `compute` over the shards of a batch.

    Needs a mesh that is set, in which no axis but those of the batch is larger than 1.

    Args:
      compute: pure `(batch, key, *shared) -> tree` of arrays, given the rows of a shard and a key
        of its own. It sees no mesh.
    """

    def local(batch: Batch, key: jax.Array, *shared: Any) -> Any:
        devices = math.prod(jax.lax.axis_size(axis) for axis in BATCH_AXES)
        held = SHARDS // devices
        shards = jax.tree.map(lambda x: x.reshape(held, -1, *x.shape[1:]), batch)
        first = jax.lax.axis_index(BATCH_AXES) * held

        # What is computed knows no mesh, whose size could choose another kernel, but the chip.
        chip = jax.sharding.get_abstract_mesh().abstract_device
        alone = AbstractMesh((), (), abstract_device=chip)

        def one(i: jax.Array, after: Any = ()) -> Any:
            rows = jax.tree.map(lambda x: x[i], shards)
            # No shard begins before the one before it is done, or all would be in memory at once.
            rows, _ = jax.lax.optimization_barrier((rows, after))
            with jax.sharding.use_abstract_mesh(alone):
                return _apart(compute, rows, jax.random.fold_in(key, first + i), *shared)

        return _over_devices(_over_held(one, held), devices)

    def whole(batch: Batch, key: jax.Array, *shared: Any) -> Any:
        specs = (PartitionSpec(BATCH_AXES), *(PartitionSpec() for _ in (key, *shared)))
        # Types are not checked: else the gradient of what all devices share would be summed by
        # the backend as soon as it is taken.
        mapped = jax.shard_map(local, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
        return jax.lax.optimization_barrier(mapped(batch, key, *shared))

    return whole


def make_deterministic(gradient: Callable) -> Callable:
    """Returns a gradient like that of `bigjax.accumulate.make_gradient`, by logical shards.

    Each shard's gradient is weighted by the weight of its loss. What the model keeps beside its
    parameters (BatchNorm's statistics) becomes the mean over the shards, each of which normalizes
    by the statistics of its own rows alone.
    """

    def compute(batch: Batch, key: jax.Array, params: Any, extra: Any):
        grads, extra, metrics = gradient(params, extra, batch, key)
        return jax.tree.map(lambda g: g * metrics['loss'][1], grads), extra, metrics

    def mean(total: jax.Array) -> jax.Array:
        return total // SHARDS if jnp.issubdtype(total.dtype, jnp.integer) else total / SHARDS

    def whole(params: Any, extra: Any, batch: Batch, key: jax.Array):
        grads, extra, metrics = sum_over_shards(compute)(batch, key, params, extra)
        weight = jnp.maximum(metrics['loss'][1], 1.0)
        return jax.tree.map(lambda g: g / weight, grads), jax.tree.map(mean, extra), metrics

    return whole


def _apart(compute: Callable[..., Any], *given: Any) -> Any:
    """Returns `compute(*given)`, compiled alike whatever stands around it."""

    def once(i: jax.Array, _: Any) -> Any:
        # A barrier keeps what is within from being fused with what is outside.
        (*inputs, _) = jax.lax.optimization_barrier((*given, i))
        return jax.lax.optimization_barrier(compute(*inputs))

    if accelerator() is None:
        # XLA:CPU computes convolutions in loops otherwise than outside, and slowly.
        return once(jnp.int32(0), None)
    # Compilers for accelerators see further. A loop whose end they do not know stays a program of
    # its own, and what it gives depends on `i`, so that nothing can be moved out of it.
    end = jax.lax.optimization_barrier(jnp.int32(1))
    return jax.lax.fori_loop(0, end, once, _zeros(compute, *given))


def _zeros(compute: Callable[..., Any], *given: Any) -> Any:
    shapes = jax.eval_shape(compute, *given)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _over_held(one: Callable[..., Any], count: int, first: Any = 0, after: Any = ()) -> Any:
    """Returns the sum of `one(i)` over the shards `first`, …, `first + count - 1` of a device."""
    if count == 1:
        return one(first, after)
    half = count // 2

    def add(total: Any, i: jax.Array) -> tuple[Any, None]:
        value = _over_held(one, half, first + i * half, total)
        # Not 0 + value: that has another sign where the value is -0.
        return jax.tree.map(lambda t, v: jnp.where(i == 0, v, t + v), total, value), None

    return jax.lax.scan(add, _zeros(one, first), jnp.arange(2), unroll=accelerator() is None)[0]


def _over_devices(tree: Any, devices: int) -> Any:
    """Returns the sum of every device's `tree`, added in pairs at distance 1, 2, 4, …

    An array is cut into as many parts as there are devices, where they divide it: of each pair, one
    sums one half of the parts and one the other, so that as many bytes travel as in an all-reduce.
    """

    def swapped(x: jax.Array, distance: int) -> jax.Array:
        return jax.lax.ppermute(x, BATCH_AXES, [(i, i ^ distance) for i in range(devices)])

    distances = [2**k for k in range(devices.bit_length() - 1)]
    device = jax.lax.axis_index(BATCH_AXES)

    def total(x: jax.Array) -> jax.Array:
        if x.size % devices:
            for distance in distances:
                x += swapped(x, distance)
            return x
        parts = x.reshape(devices, -1)
        for distance in distances:
            # Of the numbers of the parts left, the lowest bit comes last.
            parts = parts.reshape(-1, 2, parts.shape[1])
            bit = device // distance % 2
            parts = parts[:, bit] + swapped(parts[:, 1 - bit], distance)
        return jax.lax.all_gather(parts[0], BATCH_AXES).reshape(x.shape)

    return jax.tree.map(total, tree) if devices > 1 else tree


def check(run: Run, mesh: Mesh) -> None:
    """Raises UsageError unless a run with `--deterministic` can be cut into shards on a mesh."""
    others = {axis: size for axis, size in mesh.shape.items() if size > 1 and axis != 'data'}
    data = mesh.shape['data']
    if others or SHARDS % data:
        raise UsageError(
            f'--mesh={mesh_text(mesh.shape)}: --deterministic splits {SHARDS} shards over data '
            f'alone, 1, 2, 4 or 8; try --mesh=data={math.gcd(SHARDS, mesh.size)}'
        )
    for flag, batch, parts in (
        ('batch', run.batch, SHARDS * run.accumulate),
        ('eval_batch', run.eval_batch or run.batch, SHARDS),
    ):
        if batch % parts:
            times = f' times --accumulate={run.accumulate}' if parts > SHARDS else ''
            raise UsageError(
                f'--{flag}={batch}: must be a multiple of {parts}, the {SHARDS} shards of '
                f'--deterministic{times}; try --{flag}={max(1, round(batch / parts)) * parts}'
            )
