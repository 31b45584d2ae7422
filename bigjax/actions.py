"""What `--action` does: train, evaluate, generate, describe; and what a person is told after it."""

import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import jax

from bigjax import describe, generate, optimizers, report, train
from bigjax.checkpoint import Checkpoints
from bigjax.evaluate import Evaluator
from bigjax.experiment import Experiment, UsageError
from bigjax.identity import Identity
from bigjax.state import TrainState, setup


def run(
    action: str, experiment: Experiment, identity: Identity, workdir: Path, checkpoint: str
) -> int:
    """Does one action and returns the exit status.

    Args:
      action: `'train'`, `'evaluate'`, `'generate'` or `'describe'`.
      experiment: what to do it with.
      identity: its name and knobs.
      workdir: where the run is kept.
      checkpoint: for evaluate and generate, `'latest'`, `'best'` or a step.

    Raises:
      UsageError: something the user asked for does not fit.
    """
    if action == 'describe':
        plan = setup(experiment)
        print(json.dumps(describe.describe(experiment, identity, plan, workdir), indent=1))
        return 0
    if action == 'train':
        return _train(experiment, identity, workdir)
    plan = setup(experiment)
    if action == 'generate' and not experiment.task.decoder:
        raise UsageError(
            f'--action=generate: {identity.experiment} is no language model; try --action=evaluate'
        )
    if not (workdir / 'run.json').exists():
        raise UsageError(
            f'--workdir={workdir}: holds no run; train first: --action=train with the same knobs'
        )
    identity.claim(workdir)
    checkpoints = Checkpoints(workdir, keep=experiment.run.keep)
    step = checkpoints.choose(checkpoint)
    with jax.set_mesh(plan.mesh):
        state, _ = checkpoints.restore(step, plan.abstract, plan.shardings)
        if action == 'evaluate':
            _print_scores(experiment, step, Evaluator(experiment, plan)(state))
        else:
            _print_samples(experiment, state, sys.stdout)
    return 0


def _train(experiment: Experiment, identity: Identity, workdir: Path) -> int:
    outcome = train.train(experiment, identity, workdir)
    command = _command(identity, workdir)
    if outcome.signal:
        name = signal.Signals(outcome.signal).name
        _tell(
            f'\nstopped by {name} at step {outcome.step} of {experiment.run.steps}; saved. '
            f'Go on with:\n  {command}'
        )
        return 128 + outcome.signal
    if jax.process_index() == 0:
        curves = report.learning_curves(workdir)
        assert outcome.scores is not None  # only a signal leaves them out
        _print_scores(experiment, outcome.step, outcome.scores)
    _print_samples(experiment, outcome.state, sys.stderr)
    _tell(outcome.times.summary())
    if jax.process_index() == 0:
        _tell(f'learning curves: {curves}')
    verb = 'generate' if experiment.task.decoder else 'evaluate'
    _tell(f'next: {command} --action={verb}')
    return 0


def _command(identity: Identity, workdir: Path) -> str:
    """Returns the command line that goes on with a run, to be pasted where this one was typed."""
    flags = [f'--{name}={identity.knobs[name]}' for name in identity.changed]
    words = [sys.argv[0], f'--experiment={identity.experiment}', *flags, f'--workdir={workdir}']
    # The very interpreter: the environment it belongs to need not be activated.
    python = os.path.relpath(sys.executable)
    return shlex.join([sys.executable if python.startswith('..') else python, *words])


def _print_scores(experiment: Experiment, step: int, scores: dict[str, dict[str, Any]]) -> None:
    """Tells every evaluation set's metrics, with what follows from them for its kind of task."""
    for name, metrics in scores.items():
        _tell(f'\n{name} after step {step}')
        if 'confusion' in metrics:
            names = experiment.task.class_names
            text = report.classification_report(metrics['confusion'], names)[1]
            text += f'\nloss {metrics["loss"]:.4f}'
        elif 'bits_per_byte' in metrics:
            text = report.language_model_report(float(metrics['loss']))[1]
            text += f', {metrics["bits_per_byte"]:.4f} bits per byte'
        else:
            text = ', '.join(f'{k.replace("_", " ")} {v:.4f}' for k, v in metrics.items())
        _tell(text)


def _print_samples(experiment: Experiment, state: TrainState, file: Any) -> None:
    """Writes texts drawn from a language model; does nothing for any other model."""
    decoder = experiment.task.decoder
    if decoder is None:
        return
    params = optimizers.evaluation_params(state.params, state.opt_state)
    texts = generate.generate_text(decoder, experiment.tokenizer, params, experiment.sample)
    if jax.process_index() == 0:
        for text in texts:
            print(f'{"-" * 20} sample {"-" * 20}\n{text}', file=file)


def _tell(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)
