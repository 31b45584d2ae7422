"""What the loop costs over the bare compiled step, and how long it waits for input.

    python tests/benchmark_loop.py [--experiment=NAME] [--KNOB=VALUE …]

Not a test: timings on a shared machine flicker. Bare and loop run alternately; medians are told.
"""

import contextlib
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax

import launch
from bigjax import experiment, sharding, train
from bigjax import identity as identities
from bigjax.data import pipeline
from bigjax.experiment import Experiment
from bigjax.state import make_init, setup

ROUNDS = 5
WARM = 10


def bare_seconds(run: Experiment, steps: int) -> float:
    """Returns seconds a step of the compiled program alone, on one batch that lies ready."""
    plan = setup(run)
    with jax.set_mesh(plan.mesh):
        init = make_init(run.task, run.optimizer, run.run.seed)
        state = jax.jit(init, out_shardings=plan.shardings)()
        rows = pipeline.train_batches(run.data.train, batch=run.run.batch, seed=0)
        placed = sharding.batch_sharding(plan.mesh, stacked=True)
        batch = sharding.shard_batch({k: v[None] for k, v in rows[0].items()}, placed)
        out_shardings = (plan.shardings, sharding.replicated(plan.mesh))
        step = jax.jit(
            train.make_train_step(run),
            in_shardings=(plan.shardings, None),
            out_shardings=out_shardings,
            donate_argnums=0,
        )
        state, before = jax.block_until_ready(step(state, batch))
        start = time.perf_counter()
        for _ in range(steps):
            state, values = step(state, batch)
            jax.block_until_ready(before)  # As in the loop: one step runs, one is waited for.
            before = values
        jax.block_until_ready(state)
        return (time.perf_counter() - start) / steps


def loop_seconds(name: str, knobs: dict[str, Any], steps: int) -> tuple[float, float]:
    """Returns seconds a step in `train`, and those of them spent waiting for input.

    They are the difference of a long and a short run: what happens once is in neither.
    """
    function = experiment.find(name)
    spent = []
    for count in (WARM, WARM + steps):
        knobs = {**knobs, 'steps': count}
        run = experiment.build(function, knobs)
        identity = identities.identity(name, function, knobs)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            spent.append(train.train(run, identity, Path(folder)).times.seconds())
    step, wait = ((spent[1][use] - spent[0][use]) / steps for use in ('step', 'input'))
    return step + wait, wait


def main() -> None:
    """Measures the experiment and prints three figures."""
    launch.prepare_process()
    given = dict(arg.removeprefix('--').split('=', 1) for arg in sys.argv[1:])
    name = given.pop('experiment', 'gpt_stdlib')
    function = experiment.find(name)
    known = experiment.knobs(function)
    knobs = {'eval_every': 0, 'save_every': 0, 'warmup': 0}
    knobs |= {k: type(known[k].default)(value) for k, value in given.items()}
    steps = int(knobs.pop('steps', 200))
    run = experiment.build(function, knobs)
    bare, loop, wait = [], [], []
    for _ in range(ROUNDS):
        bare.append(bare_seconds(run, steps))
        step_seconds, input_seconds = loop_seconds(name, knobs, steps)
        loop.append(step_seconds)
        wait.append(input_seconds / step_seconds)
    bare_ms, loop_ms = (1e3 * statistics.median(seconds) for seconds in (bare, loop))
    print(f'{name}, {steps} steps, median of {ROUNDS} rounds')
    print(f'bare {bare_ms:.3f} ms/step, loop {loop_ms:.3f} ms/step ({loop_ms / bare_ms - 1:+.1%})')
    print(f'waiting for input {statistics.median(wait):.2%} of the loop')
    for title, seconds in (('bare', bare), ('loop', loop)):
        print(title, ' '.join(f'{1e3 * s:.3f}' for s in seconds))


if __name__ == '__main__':
    main()
