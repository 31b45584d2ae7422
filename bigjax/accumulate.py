"""The gradient of one step's batch, in one piece or accumulated over microbatches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bigjax.deterministic import make_deterministic
from bigjax.task import Batch, Task
from pallas_kernels.chip import accelerator


def make_gradient(task: Task, accumulate: int, *, deterministic: bool = False) -> Callable:
    """Returns `(params, extra, batch, key) -> (gradients, extra, {name: (sum, weight)})`.

    The batch is computed in `accumulate` microbatches. Each one's gradient is weighted by the
    weight of its loss, so the result is that of the whole batch also where rows weigh differently.
    Microbatch a takes rows a, a + accumulate, …: every device then uses rows it holds already.
    `deterministic` makes the bits the same for any number of devices, see `bigjax.deterministic`;
    microbatches are then those of each logical shard.
    """
    gradient = jax.value_and_grad(task.loss, has_aux=True)

    def whole(params: Any, extra: Any, batch: Batch, key: jax.Array):
        (_, (extra, metrics)), grads = gradient(params, extra, batch, key, True)
        return grads, extra, metrics

    def accumulated(params: Any, extra: Any, batch: Batch, key: jax.Array):
        batches = jax.tree.map(
            lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )

        def add(carry, inputs):
            extra, total = carry
            microbatch, i = inputs
            grads, extra, metrics = whole(params, extra, microbatch, jax.random.fold_in(key, i))
            weighted = jax.tree.map(lambda g: g * metrics['loss'][1], grads)
            return (extra, jax.tree.map(jnp.add, total, (weighted, metrics))), None

        first = jax.tree.map(lambda x: x[0], batches)
        grads, _, metrics = jax.eval_shape(whole, params, extra, first, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, metrics))
        (extra, (grads, metrics)), _ = jax.lax.scan(
            add,
            (extra, zeros),
            (batches, jnp.arange(accumulate)),
            # XLA:CPU computes convolution gradients fifty times slower in loops.
            unroll=accelerator() is None,
        )
        weight = jnp.maximum(metrics['loss'][1], 1.0)
        return jax.tree.map(lambda g: g / weight, grads), extra, metrics

    chosen = whole if accumulate == 1 else accumulated
    return make_deterministic(chosen) if deterministic else chosen
