"""One side of a race: an experiment's own train step on one batch, timed when asked to.

    python tests/race/ours.py CASE BATCH.npz

Writes its batch for the other side, says 'ready', then answers each number n that it reads with the
milliseconds of n steps.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
from cases import CASES, serve

import launch
from bigjax import experiment, sharding, train
from bigjax.data import pipeline
from bigjax.state import make_init, setup


def main(name: str, path: str) -> None:
    """Compiles the case's step and serves it."""
    launch.prepare_process()
    case = CASES[name]
    run = experiment.load(
        case['experiment'], **{'steps': 1000, 'warmup': 0, 'eval_every': 0, **case['knobs']}
    )
    plan = setup(run)
    batches = pipeline.train_batches(
        run.data.train, batch=run.run.batch, seed=0, augment=run.augment
    )
    rows = dict(batches[0])
    np.savez(path, **rows)
    with jax.set_mesh(plan.mesh):
        init = make_init(run.task, run.optimizer, run.run.seed)
        state = jax.jit(init, out_shardings=plan.shardings)()
        placed = sharding.batch_sharding(plan.mesh, stacked=True)
        batch = sharding.shard_batch({k: v[None] for k, v in rows.items()}, placed)
        compiled = jax.jit(
            train.make_train_step(run),
            in_shardings=(plan.shardings, None),
            out_shardings=(plan.shardings, sharding.replicated(plan.mesh)),
            donate_argnums=0,
        )

        def step() -> None:
            nonlocal state
            state, _ = jax.block_until_ready(compiled(state, batch))

        serve(step)


if __name__ == '__main__':
    main(*sys.argv[1:])
