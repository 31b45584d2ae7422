"""Checkpoints: a thin layer over orbax v1, asynchronous, strict, restored onto any mesh."""

import contextlib
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from bigjax.experiment import UsageError
from bigjax.sharding import path_string

_preservation = ocp.training.preservation_policies


def _leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns `{path: (shape, dtype)}` of every array in an abstract or saved tree."""
    return {
        path_string(path): (tuple(leaf.shape), str(leaf.dtype))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Returns one line for every leaf that is missing, extra, reshaped or retyped."""
    lines = [f'missing: {path}' for path in wanted if path not in saved]
    lines += [f'extra: {path}' for path in saved if path not in wanted]
    for path in wanted.keys() & saved.keys():
        (shape, dtype), (new_shape, new_dtype) = saved[path], wanted[path]
        if shape != new_shape:
            lines.append(f'reshaped: {path} is {shape} there, {new_shape} here')
        if dtype != new_dtype:
            lines.append(f'retyped: {path} is {dtype} there, {new_dtype} here')
    return sorted(lines)


class SaveError(OSError):
    """A checkpoint could not be written; the message names it, the cause and the last good one."""


class Checkpoints:
    """The checkpoints of one run: the latest few and the best.

    A save returns as soon as the state has been copied; files are written in the background and a
    checkpoint counts only when it is complete, so a process killed at any time leaves whole ones.
    """

    def __init__(self, workdir: Path, *, keep: int) -> None:
        policy = _preservation.AnyPreservationPolicy(
            [
                _preservation.LatestN(keep),
                _preservation.BestN(
                    get_metric_fn=lambda metrics: metrics['badness'],
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        self.directory = workdir / 'checkpoints'
        self._writing: int | None = None
        # Orbax's threads wait for a folder that is made in the background, the process at its exit
        # for them: five minutes where it cannot be made. Made before they start, none waits.
        context = ocp.Context()
        context.asynchronous.create_directories_asynchronously = False
        self._checkpointer = ocp.training.Checkpointer(
            self.directory, preservation_policy=policy, context=context
        )

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, ascending."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def best(self) -> int | None:
        """Returns the step of the best checkpoint; the latest where none was evaluated."""
        scored = [c for c in self._checkpointer.checkpoints if c.metrics]
        best = min(scored, key=lambda c: c.metrics['badness'], default=None)
        return best.step if best else max(self.steps(), default=None)

    def choose(self, which: str) -> int:
        """Returns the step that `which` names: `'latest'`, `'best'` or a number.

        Raises:
          UsageError: there is no such checkpoint.
        """
        steps, best = self.steps(), self.best()
        if best is None:
            raise UsageError(
                f'--workdir={self.directory.parent}: holds no checkpoint yet; '
                f'train first, with --action=train'
            )
        named = {'latest': max(steps), 'best': best, **{str(s): s for s in steps}}
        if which not in named:
            raise UsageError(
                f'--checkpoint={which}: must be latest, best or one of '
                f'{", ".join(map(str, steps))}; try --checkpoint=latest'
            )
        return named[which]

    def save(
        self, step: int, state: Any, *, progress: dict[str, Any], badness: float | None
    ) -> None:
        """Starts writing `state`.

        Blocks while the save before this one is in progress.

        Args:
          step: the step the state has reached; nothing happens if it is already saved.
          state: pytree of arrays that all processes own together.
          progress: what the loop must remember, as JSON.
          badness: what the best checkpoint has least of; None where nothing was evaluated. One
            that is not a number is never the best.

        Raises:
          SaveError: this save or the one before failed.
        """
        if self._writing is None and jax.process_index() == 0:
            # Not done on opening: another process may evaluate a run while this one saves it.
            for torn in self.directory.glob('*.orbax-checkpoint-tmp'):
                shutil.rmtree(torn, ignore_errors=True)
        self.wait()
        if step not in self.steps():
            scored = badness is not None and not math.isnan(badness)
            self._writing = step
            with self._explained():
                self._checkpointer.save_checkpointables_async(
                    step,
                    {'state': state},
                    force=True,
                    metrics={'badness': badness} if scored else None,
                    custom_metadata=progress,
                )

    def restore(self, step: int, abstract: Any, shardings: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the state saved at `step`, placed by `shardings`, and the loop's progress.

        Raises:
          UsageError: a leaf is missing, extra, reshaped or retyped; all are named.
        """
        metadata = self._checkpointer.checkpointables_metadata(step)
        wrong = differences(_leaves(metadata.metadata['state']), _leaves(abstract))
        if wrong:
            raise UsageError(
                f'--workdir={self.directory.parent}: checkpoint {step} does not fit this model:\n  '
                + '\n  '.join(wrong)
                + '\nuse the knobs and the code it was trained with, or another --workdir'
            )
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
        )
        loaded = self._checkpointer.load_checkpointables(step, {'state': target})
        return loaded['state'], dict(metadata.custom_metadata or {})

    def wait(self) -> None:
        """Blocks until the save in progress is complete; raises SaveError if it failed."""
        with self._explained():
            self._checkpointer.wait()

    def close(self) -> None:
        """Waits for the save in progress and frees the writer's threads; raises as `wait` does."""
        with self._explained():
            self._checkpointer.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Says what is lost and what is left where a save fails.

        A full disk is an OSError or a ValueError, by which of orbax's layers met it first.
        """
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            number = re.search(r"os_error_code='(\d+)'", str(error))
            cause = os.strerror(int(number[1])) if number else str(error)
            good = max(self.steps(), default=None)
            raise SaveError(
                f'--workdir={self.directory.parent}: checkpoint {self._writing} could not be '
                f'written to {self.directory} ({cause}); '
                + (
                    'there is no earlier one'
                    if good is None
                    else f'the last good one is {good}, from which the same command goes on'
                )
            ) from error
