"""The train step and the loop around it, top to bottom."""

import contextlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bigjax import describe, report, sharding
from bigjax.accumulate import make_gradient
from bigjax.checkpoint import Checkpoints
from bigjax.compiler_options import compiler_options
from bigjax.data import pipeline
from bigjax.evaluate import Evaluator
from bigjax.experiment import Experiment, Run, UsageError
from bigjax.finite import stop_if_not_finite
from bigjax.identity import Identity
from bigjax.interrupt import catch_interrupts
from bigjax.metrics import TimeSplit, Writer
from bigjax.offload import offloaded
from bigjax.profile import Profile
from bigjax.state import Setup, TrainState, check_pipeline, check_pretrained, first_state, setup
from bigjax.task import Batch


class Outcome(NamedTuple):
    """What came of a call of `train`.

    Attributes:
      step: the step reached.
      state: the state at it.
      scores: `{set: {metric: value}}` at it; None if a signal ended training.
      signal: number of the signal that ended training, or None.
      times: where the seconds went.
    """

    step: int
    state: TrainState
    scores: dict[str, dict[str, np.ndarray]] | None
    signal: int | None
    times: TimeSplit


def make_train_step(experiment: Experiment) -> Callable:
    """Returns the pure `(state, batches) -> (state, metrics)`, not yet jitted.

    `batches` holds K consecutive batches, stacked on a leading axis, and so do the metrics; the
    random key of a step depends on the seed and the step alone.
    """
    task, optimizer, run = experiment.task, experiment.optimizer, experiment.run
    gradient = make_gradient(task, run.accumulate, deterministic=run.deterministic)
    if run.offload == 'optimizer':
        optimizer = offloaded(optimizer)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(run.seed), state.step)
        grads, extra, metrics = gradient(state.params, state.extra, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        squares_L = jnp.stack([jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)])
        means = {
            name: value / jnp.maximum(weight, 1.0) for name, (value, weight) in metrics.items()
        }
        means['learning_rate'] = jnp.asarray(experiment.schedule(state.step), jnp.float32)
        means['grad_norm'] = jnp.sqrt(jnp.sum(squares_L))
        means['finite'] = jnp.isfinite(squares_L)
        # As `optimizer` keeps the rest of the state where it skips such a step.
        finite = jnp.all(means['finite'])
        extra = jax.tree.map(lambda new, old: jnp.where(finite, new, old), extra, state.extra)
        return TrainState(state.step + 1, params, opt_state, extra), means

    def train_step(state: TrainState, batches: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        if run.steps_per_call > 1:
            return jax.lax.scan(step, state, batches)
        # One step is no loop: XLA:CPU computes convolution gradients fifty times slower in loops.
        state, metrics = step(state, jax.tree.map(lambda x: x[0], batches))
        return state, jax.tree.map(lambda x: x[None], metrics)

    return train_step


def jit_train_step(experiment: Experiment, plan: Setup) -> Any:
    """Returns the train step jitted for a mesh: a state takes the place of the one before."""
    flops = experiment.task.flops_per_example * experiment.run.batch // experiment.run.accumulate
    return jax.jit(
        make_train_step(experiment),
        in_shardings=(plan.shardings, None),
        out_shardings=(plan.shardings, sharding.replicated(plan.mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(plan.mesh, plan.parameters, flops),
    )


def train(experiment: Experiment, identity: Identity, workdir: Path) -> Outcome:
    """Trains until the last step, an early stop or a signal.

    The same call again goes on from the last checkpoint exactly as if it had not stopped.

    Raises:
      UsageError: something does not fit; raised before anything is compiled.
      FloatingPointError: a loss or gradient is not finite and `nonfinite` is `'stop'`.
      bigjax.checkpoint.SaveError: a checkpoint could not be written.
    """
    run, task, times = experiment.run, experiment.task, TimeSplit()

    # ---- Where everything lives ----
    plan = setup(experiment)
    evaluator = Evaluator(experiment, plan)
    check_pipeline(experiment, plan)
    if not (workdir / 'run.json').exists():
        check_pretrained(experiment, plan)
    identity.claim(workdir)
    description = describe.describe(experiment, identity, plan, workdir)
    if jax.process_index() == 0:
        changed = {name: identity.knobs[name] for name in identity.changed}
        print(report.summary_table({**description, 'knobs': changed}), file=sys.stderr, flush=True)
    checkpoints = Checkpoints(workdir, keep=run.keep)
    start = max(checkpoints.steps(), default=0)
    check_start(start, run)
    writer = Writer(
        workdir,
        steps=run.steps,
        log_every=run.log_every,
        unit=task.unit,
        units_per_step=description[f'{task.unit}_per_step'],
        flops_per_step=description['flops_per_step'],
        peak=description['peak_flops'],
        resume_step=start,
        split=times,
        active=jax.process_index() == 0,
    )
    profile = Profile(run.profile_steps, workdir)

    with (
        jax.set_mesh(plan.mesh),
        catch_interrupts() as interrupt,
        contextlib.closing(checkpoints),
        writer,
        profile,
    ):
        # ---- State: restored, or born sharded ----
        progress: dict[str, Any] = {'best': None, 'since_best': 0}
        if checkpoints.steps():
            with times('checkpoint'):
                state, progress = checkpoints.restore(start, plan.abstract, plan.shardings)
            writer.note(f'going on from step {start}')
        else:
            with times('compile'):
                state = first_state(experiment, plan)

        # ---- Data: the batch of step n is a function of (seed, n) ----
        part, parts = sharding.batch_part(plan.mesh)
        dataset = pipeline.train_batches(
            experiment.data.train,
            batch=run.batch,
            seed=run.seed,
            augment=experiment.augment,
            process_index=part,
            process_count=parts,
        )
        placed = sharding.batch_sharding(plan.mesh, stacked=True)
        batches = pipeline.iterate(
            dataset,
            start=start,
            stop=run.steps,
            stack=run.steps_per_call,
            place=lambda batch: sharding.shard_batch(batch, placed),
            workers=run.workers,
        )

        # ---- The step, compiled once ----
        train_step = jit_train_step(experiment, plan)

        def log(first: int, values: dict[str, Any]) -> None:
            """Reads the metrics of one call, in which steps `first`, first + 1, … were done."""
            values = jax.device_get(values)
            for i in range(run.steps_per_call):
                row = {name: value[i] for name, value in values.items()}
                if experiment.nonfinite == 'stop':
                    stop_if_not_finite(first + i, row, plan.abstract.params)
                writer.step(first + i, {name: v for name, v in row.items() if name != 'finite'})

        # ---- The loop ----
        step, pending, scores = start, None, None
        stopping = 0 < run.patience <= progress['since_best']
        while step < run.steps and not stopping:
            batch = next(batches)
            # Input is waited for only where the devices have finished the step before.
            busy = pending is not None and not pending[1]['loss'].is_ready()
            times.charge('step' if busy else 'input')
            profile.at(step)
            with times('compile' if step == start else 'step'):
                state, values = train_step(state, batch)
                if pending:
                    log(*pending)  # One step late: the device is busy with the next by now.
            pending = (step + 1, values)
            step += run.steps_per_call

            stopping = interrupt.requested(step // run.steps_per_call)
            evaluating = not stopping and (step == run.steps or _every(run.eval_every, step))
            saving = stopping or step == run.steps or _every(run.save_every, step)
            if evaluating or saving:
                with times('step'):
                    log(*pending)  # A state that is not finite must not be saved.
                pending = None
            badness = None
            if evaluating:
                with times('evaluation'):
                    scores = evaluator(state)
                for name, score in scores.items():
                    writer.evaluation(step, name, {k: v for k, v in score.items() if v.ndim == 0})
                badness = evaluator.badness(scores)
                best = math.inf if progress['best'] is None else progress['best']
                better = badness < best  # False for what is not a number.
                progress = {
                    'best': badness if better else progress['best'],
                    'since_best': 0 if better else progress['since_best'] + 1,
                }
                saving = saving or better
                stopping = 0 < run.patience <= progress['since_best']
            if saving or stopping:
                with times('checkpoint'):
                    checkpoints.save(step, state, progress=progress, badness=badness)

        # ---- The end ----
        with times('checkpoint'):
            checkpoints.wait()
        if scores is None and not interrupt.signal:
            with times('evaluation'):
                scores = evaluator(state)
    return Outcome(step, state, scores, interrupt.signal, times)


def check_start(start: int, run: Run) -> None:
    """Raises UsageError if calls of `steps_per_call` steps do not go on from step `start`."""
    if start % run.steps_per_call:
        raise UsageError(
            f'--steps_per_call={run.steps_per_call}: must divide the step to go on from, {start}; '
            f'try --steps_per_call={math.gcd(start, run.steps_per_call)}'
        )


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0
