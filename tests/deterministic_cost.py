"""How much longer a step takes with --deterministic, on all the devices there are.

    JAX_NUM_CPU_DEVICES=8 python tests/deterministic_cost.py cnn

or `gpt2`. Steps with and without take turns in one process, so that what else the machine does
meets both; the medians are printed, and their ratio.
"""

import statistics
import sys
import time
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parent.parent))

import same_model

from bigjax import sharding
from bigjax.data import pipeline
from bigjax.state import first_state, setup
from bigjax.train import make_train_step

ROUNDS, STEPS = 21, 1
KNOBS = {'cnn': {'dataset': 'digits', 'batch': 64}, 'gpt2': {'width': 128, 'seq': 64}}


def compiled(name, deterministic):
    """Returns a step as it is trained, and its arguments."""
    made = same_model.load(name, deterministic=deterministic, **KNOBS[name])
    plan = setup(made)
    placed = sharding.batch_sharding(plan.mesh, stacked=True)
    with jax.set_mesh(plan.mesh):
        state = first_state(made, plan)
        rows = pipeline.train_batches(made.data.train, batch=made.run.batch, seed=0)
        place = lambda batch: sharding.shard_batch(batch, placed)  # noqa: E731
        batch = next(pipeline.iterate(rows, stop=1, stack=1, place=place))
        step = jax.jit(make_train_step(made), out_shardings=(plan.shardings, None))
        return step.lower(state, batch).compile(), state, batch


def seconds(step, state, batch):
    start = time.perf_counter()
    for _ in range(STEPS):
        out = step(state, batch)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / STEPS


def main(name):
    steps = [compiled(name, deterministic) for deterministic in (False, True)]
    times = [[seconds(*step) for step in steps] for _ in range(ROUNDS)]
    plain, exact = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    count = jax.device_count()
    print(f'{name}, {count} devices: {plain:.1f} ms, {exact:.1f} ms, {exact / plain:.2f} times')


if __name__ == '__main__':
    main(*sys.argv[1:])
