"""The train step and the loop around it, top to bottom."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bigjax import describe, report, sharding
from bigjax.checkpoint import Checkpoints
from bigjax.data import pipeline
from bigjax.evaluate import Evaluator
from bigjax.experiment import Experiment, Identity
from bigjax.interrupt import catch_interrupts
from bigjax.metrics import TimeSplit, Writer
from bigjax.task import Batch, Task


class TrainState(NamedTuple):
    """What a step reads and writes, and a checkpoint holds.

    Attributes:
      step: int32 scalar, steps done.
      params: float32 parameters.
      opt_state: state of the optax chain.
      extra: what the model keeps beside its parameters, such as BatchNorm statistics.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    extra: Any


class Setup(NamedTuple):
    """Where everything will live, known before anything is allocated or compiled.

    Attributes:
      mesh: devices of all processes.
      abstract: train state of shapes and dtypes.
      shardings: train state of shardings.
    """

    mesh: jax.sharding.Mesh
    abstract: TrainState
    shardings: TrainState


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


def make_init(task: Task, optimizer: optax.GradientTransformation, seed: int) -> Callable:
    """Returns the pure `() -> TrainState` of step 0."""

    def init() -> TrainState:
        variables = dict(task.init(jax.random.key(seed)))
        params = variables.pop('params')
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), variables)

    return init


def make_gradient(task: Task, accumulate: int) -> Callable:
    """Returns `(params, extra, batch, key) -> (gradients, extra, {name: (sum, weight)})`.

    The batch is computed in `accumulate` microbatches. Each one's gradient is weighted by the
    weight of its loss, so the result is that of the whole batch also where rows weigh differently.
    Microbatch a takes rows a, a + accumulate, …: every device then uses rows it holds already.
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
            add, (extra, zeros), (batches, jnp.arange(accumulate))
        )
        weight = jnp.maximum(metrics['loss'][1], 1.0)
        return jax.tree.map(lambda g: g / weight, grads), extra, metrics

    return whole if accumulate == 1 else accumulated


def make_train_step(experiment: Experiment) -> Callable:
    """Returns the pure `(state, batches) -> (state, metrics)`, not yet jitted.

    `batches` holds K consecutive batches, stacked on a leading axis, and so do the metrics; the
    random key of a step depends on the seed and the step alone.
    """
    task, optimizer, run = experiment.task, experiment.optimizer, experiment.run
    gradient = make_gradient(task, run.accumulate)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(run.seed), state.step)
        grads, extra, metrics = gradient(state.params, state.extra, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        squares_L = jnp.stack([jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)])
        means = {name: value / jnp.maximum(weight, 1.0) for name, (value, weight) in metrics.items()}
        means['learning_rate'] = jnp.asarray(experiment.schedule(state.step), jnp.float32)
        means['grad_norm'] = jnp.sqrt(jnp.sum(squares_L))
        means['finite'] = jnp.isfinite(squares_L)
        return TrainState(state.step + 1, params, opt_state, extra), means

    return lambda state, batches: jax.lax.scan(step, state, batches)


def setup(experiment: Experiment) -> Setup:
    """Returns mesh, shapes and shardings of a run; allocates and compiles nothing.

    Raises:
      UsageError: mesh, batch, rules, or the metric to monitor do not fit together.
    """
    run = experiment.run
    mesh = sharding.make_mesh(run.mesh)
    sharding.check_batch(run.batch, run.accumulate, mesh)
    abstract = jax.eval_shape(make_init(experiment.task, experiment.optimizer, run.seed))
    return Setup(mesh, abstract, sharding.state_shardings(abstract, experiment.rules, mesh))


def stop_if_not_finite(step: int, values: dict[str, np.ndarray], abstract: TrainState) -> None:
    """Raises FloatingPointError naming step and first bad leaf, if loss or gradient is not finite."""
    bad = [
        sharding.path_string(path)
        for (path, _), finite in zip(
            jax.tree_util.tree_leaves_with_path(abstract.params), values['finite'], strict=True
        )
        if not finite
    ]
    if bad or not np.isfinite(values['loss']):
        where = f'gradient of {bad[0]} and {len(bad) - 1} more' if bad else 'no gradient'
        raise FloatingPointError(
            f'step {step}: loss is {values["loss"]:g}; not finite: {where}. The last good '
            f'checkpoint is kept. Try a lower --peak_lr, --clip=1, or --nonfinite=skip.'
        )


def train(experiment: Experiment, identity: Identity, workdir: Path) -> Outcome:
    """Trains until the last step, an early stop or a signal.

    The same call again goes on from the last checkpoint exactly as if it had not stopped.

    Raises:
      UsageError: something does not fit; raised before anything is compiled.
      FloatingPointError: a loss or gradient is not finite and `nonfinite` is `'stop'`.
      OSError: a checkpoint could not be written.
    """
    run, task, times = experiment.run, experiment.task, TimeSplit()

    # ---- Where everything lives ----
    plan = setup(experiment)
    evaluator = Evaluator(experiment, plan)
    identity.claim(workdir)
    description = describe.describe(experiment, identity, plan, workdir)
    if jax.process_index() == 0:
        print(report.summary_table(description), file=sys.stderr, flush=True)
    checkpoints = Checkpoints(workdir, keep=run.keep)
    start = max(checkpoints.steps(), default=0)
    writer = Writer(
        workdir,
        steps=run.steps,
        log_every=run.log_every,
        unit=task.unit,
        units_per_step=description['units_per_step'],
        flops_per_step=description['flops_per_step'],
        peak=description['peak_flops'],
        resume_step=start,
        split=times,
        active=jax.process_index() == 0,
    )

    with jax.set_mesh(plan.mesh), catch_interrupts() as interrupt, writer:
        # ---- State: restored, or born sharded ----
        progress: dict[str, Any] = {'best': None, 'since_best': 0}
        if start:
            with times('checkpoint'):
                state, progress = checkpoints.restore(start, plan.abstract, plan.shardings)
            writer.note(f'going on from step {start}')
        else:
            with times('compile'):
                init = make_init(task, experiment.optimizer, run.seed)
                state = jax.jit(init, out_shardings=plan.shardings)()

        # ---- Data: the batch of step n is a function of (seed, n) ----
        dataset = pipeline.train_batches(
            experiment.data.train,
            batch=run.batch,
            seed=run.seed,
            augment=experiment.augment,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        batches = pipeline.iterate(
            dataset.batch(run.steps_per_call)[start // run.steps_per_call:], workers=run.workers
        )

        # ---- The step, compiled once ----
        placed = sharding.batch_sharding(plan.mesh, stacked=True)
        train_step = jax.jit(
            make_train_step(experiment),
            in_shardings=(plan.shardings, None),
            out_shardings=(plan.shardings, sharding.replicated(plan.mesh)),
            donate_argnums=0,
        )

        def log(first: int, values: dict[str, Any]) -> None:
            """Reads the metrics of one call, in which steps `first`, first + 1, … were done."""
            values = jax.device_get(values)
            for i in range(run.steps_per_call):
                row = {name: value[i] for name, value in values.items()}
                if experiment.nonfinite == 'stop':
                    stop_if_not_finite(first + i, row, plan.abstract)
                writer.step(first + i, {name: v for name, v in row.items() if name != 'finite'})

        # ---- The loop ----
        step, pending, scores = start, None, None
        stopping = 0 < run.patience <= progress['since_best']
        while step < run.steps and not stopping:
            with times('input'):
                batch = sharding.shard_batch(next(batches), placed)
            with times('compile' if step == start else 'step'):
                state, values = train_step(state, batch)
                if pending:
                    log(*pending)  # One step late: the device is busy with the next by now.
            pending = (step + 1, values)
            step += run.steps_per_call

            stopping = interrupt.requested(step)
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
                    writer.evaluation(step, name, score)
                badness = evaluator.badness(scores)
                better = progress['best'] is None or badness < progress['best']
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
            checkpoints.close()
        if scores is None and not interrupt.signal:
            with times('evaluation'):
                scores = evaluator(state)
    return Outcome(step, state, scores, interrupt.signal, times)


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0
