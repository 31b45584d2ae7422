"""What `--action` does, and what a person is told after it."""

import contextlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from bigjax import describe, generate, optimizers, report, train, units
from bigjax.checkpoint import Checkpoints
from bigjax.evaluate import Evaluator
from bigjax.experiment import Experiment, UsageError
from bigjax.identity import Identity
from bigjax.options import LATEST, Kept
from bigjax.predict import Predictor
from bigjax.pretrained.write import size_in_bytes
from bigjax.state import Setup, TrainState, first_state, setup

EXAMPLES = 4  # predictions shown of each evaluation set


def run(
    action: str,
    experiment: Experiment,
    identity: Identity,
    workdir: Path,
    kept: Kept = LATEST,
) -> int:
    """Does one action and returns the exit status.

    Args:
      action: `'train'`, `'evaluate'`, `'generate'`, `'describe'`, `'import'` or `'export'`.
      experiment: what to do it with.
      identity: its name and knobs.
      workdir: where the run is kept.
      kept: for evaluate, generate and export: which checkpoint, and where export writes.

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
    if action == 'import':
        return _import(experiment, plan, identity, workdir)
    if action == 'export':
        export = _exporter(experiment, identity, kept)
    if action == 'generate' and not _generates(experiment):
        raise UsageError(
            f'--action=generate: {identity.experiment} is no language model; try --action=evaluate'
        )
    if not (workdir / 'run.json').exists():
        raise UsageError(
            f'--workdir={workdir}: holds no run; train first: --action=train with the same knobs'
        )
    identity.claim(workdir)
    checkpoints = Checkpoints(workdir, keep=experiment.run.keep)
    step = checkpoints.choose(kept.checkpoint)
    with jax.set_mesh(plan.mesh):
        state, _ = checkpoints.restore(step, plan.abstract, plan.shardings)
        if action == 'evaluate':
            _print_scores(experiment, step, Evaluator(experiment, plan)(state, score=True))
            _print_examples(experiment, state)
        elif action == 'export':
            export(state)
        else:
            _print_samples(experiment, state, sys.stdout)
    return 0


def _import(experiment: Experiment, plan: Setup, identity: Identity, workdir: Path) -> int:
    """Writes checkpoint 0 of a run, with the weights of --pretrained."""
    if experiment.pretrained is None:
        raise UsageError(
            f'--action=import: no weights of another library fit {identity.experiment}; '
            f'try --action=train'
        )
    if not experiment.pretrained.path:
        raise UsageError(
            '--pretrained=: is empty; name the folder or .safetensors file to import, such as '
            '--pretrained=model.safetensors'
        )
    if (workdir / 'run.json').exists():
        identity.claim(workdir)
    with (
        jax.set_mesh(plan.mesh),
        contextlib.closing(Checkpoints(workdir, keep=experiment.run.keep)) as checkpoints,
    ):
        if checkpoints.steps():
            raise UsageError(
                f'--workdir={workdir}: holds checkpoint {max(checkpoints.steps())} already; '
                f'name another folder'
            )
        state = first_state(experiment, plan)
        identity.claim(workdir)
        progress = {'best': None, 'since_best': 0}
        checkpoints.save(0, state, progress=progress, badness=None)
    _tell(f'imported; next: {_command(identity, workdir)}')
    return 0


def _exporter(
    experiment: Experiment, identity: Identity, kept: Kept
) -> Callable[[TrainState], None]:
    """Returns what writes a state into --export_dir; refuses before anything is restored."""
    pretrained = experiment.pretrained
    if pretrained is None:
        raise UsageError(
            f'--action=export: {identity.experiment} has no form in another library; its '
            f'checkpoints are in its workdir'
        )
    if not kept.export_dir:
        raise UsageError('--export_dir=: is empty; name a new folder: --export_dir=exported')
    folder = Path(kept.export_dir).expanduser()
    max_bytes = size_in_bytes('max_shard_size', kept.max_shard_size)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f'--export_dir={kept.export_dir}: is there already and not an empty folder; name a new '
            f'one'
        )

    def export(state: TrainState) -> None:
        params = optimizers.evaluation_params(state.params, state.opt_state)
        count, size = pretrained.save(folder, {'params': params, **state.extra}, max_bytes)
        if experiment.tokenizer and jax.process_index() == 0:
            experiment.tokenizer.save(folder)
        _tell(f'{count} tensors, {units.size(size)}, in {folder}')

    return export


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
    _print_examples(experiment, outcome.state)
    _print_samples(experiment, outcome.state, sys.stderr)
    _tell(outcome.times.summary())
    if jax.process_index() == 0:
        _tell(f'learning curves: {curves}')
    verb = 'generate' if _generates(experiment) else 'evaluate'
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
        own = {k: v for k, v in metrics.items() if k not in experiment.score_names}
        scored = {k: v for k, v in metrics.items() if k in experiment.score_names}
        if 'confusion' in own:
            names = experiment.task.class_names
            _tell(report.classification_report(own['confusion'], names)[1])
            own = {'loss': own['loss']}
        if 'bits_per_byte' in own:
            text = report.language_model_report(float(own['loss']))[1]
            text += f', {own["bits_per_byte"]:.4f} bits per byte'
        else:
            text = _line(own)
        _tell('\n'.join(filter(None, (text, _line(scored)))))


def _line(metrics: dict[str, Any]) -> str:
    return ', '.join(f'{name.replace("_", " ")} {v:.4f}' for name, v in metrics.items())


def _generates(experiment: Experiment) -> bool:
    return bool(experiment.task.decoder or experiment.generate)


def _print_examples(experiment: Experiment, state: TrainState) -> None:
    """Tells what is predicted for a few rows of each evaluation set, where that can be shown."""
    if experiment.show is None:
        return
    params = optimizers.evaluation_params(state.params, state.opt_state)
    assert isinstance(state.step.sharding, jax.sharding.NamedSharding)
    mesh = state.step.sharding.mesh
    assert isinstance(mesh, jax.sharding.Mesh)
    with jax.set_mesh(mesh):
        predictor = Predictor(experiment, mesh)
        for name, records in experiment.data.evals.items():
            for text in predictor.examples(params, state.extra, records, EXAMPLES):
                _tell(f'\n{name} example\n{text}')


def _print_samples(experiment: Experiment, state: TrainState, file: Any) -> None:
    """Writes texts that the model generates; does nothing for one that generates none."""
    decoder = experiment.task.decoder
    params = optimizers.evaluation_params(state.params, state.opt_state)
    if experiment.generate:
        texts = experiment.generate(params, state.extra)
    elif decoder:
        texts = generate.generate_text(decoder, experiment.tokenizer, params, experiment.sample)
    else:
        return
    if jax.process_index() == 0:
        for text in texts:
            print(f'{"-" * 20} sample {"-" * 20}\n{text}', file=file)


def _tell(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)
