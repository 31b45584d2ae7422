"""Predictions over whole data sets, every real row exactly once, for scores that are no sums."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from bigjax import sharding
from bigjax.data import pipeline
from bigjax.data.pipeline import Examples, Records
from bigjax.experiment import Experiment

# The rows of a batch and what was predicted for them.
Predicted = tuple[Examples, Examples]


class Predictor:
    """Runs `task.predict` over sets of records and scores what comes out."""

    def __init__(self, experiment: Experiment, mesh: jax.sharding.Mesh) -> None:
        """Prepares; nothing is compiled before the first call."""
        self._experiment, self._mesh = experiment, mesh
        self._batch = experiment.run.eval_batch or experiment.run.batch
        assert experiment.task.predict is not None
        # On several hosts every one of them gets all rows, so that all know the scores.
        self._predict = jax.jit(experiment.task.predict, out_shardings=sharding.replicated(mesh))

    def __call__(
        self, params: Any, extra: Any, records: Records, stop: int | None = None
    ) -> Iterator[Predicted]:
        """Yields rows and predictions of each batch (of the first `stop`), without padding."""
        # Each host reads the whole batch: the rows are needed beside their predictions.
        batches = pipeline.iterate(pipeline.eval_batches(records, batch=self._batch), stop=stop)
        before: tuple[Examples, dict[str, jax.Array]] | None = None
        for batch in batches:
            outputs = self._predict(params, extra, self._place(batch))
            if before:
                yield _real_rows(*before)  # Scored while the device works on this batch.
            before = batch, outputs
        if before:
            yield _real_rows(*before)

    def _place(self, batch: Examples) -> dict[str, jax.Array]:
        # By their place in the whole batch, as predictions come back.
        placed = sharding.batch_sharding(self._mesh)
        return {
            name: jax.make_array_from_callback(x.shape, placed, x.__getitem__)
            for name, x in batch.items()
        }

    def scores(self, params: Any, extra: Any, records: Records) -> dict[str, Any]:
        """Returns `experiment.score` of all predictions, as float64 scalars.

        Raises:
          ValueError: it returns other names than `experiment.score_names`.
        """
        assert self._experiment.score is not None
        scores = self._experiment.score(self(params, extra, records))
        if set(scores) != set(self._experiment.score_names):
            raise ValueError(
                f'score gives {sorted(scores)}, score_names says {self._experiment.score_names}'
            )
        return {name: np.float64(scores[name]) for name in self._experiment.score_names}

    def examples(self, params: Any, extra: Any, records: Records, count: int) -> list[str]:
        """Returns `experiment.show` of the first `count` rows, none where it is not set."""
        show = self._experiment.show
        if show is None:
            return []
        batch, outputs = next(self(params, extra, records, stop=1))
        return show(*({name: x[:count] for name, x in part.items()} for part in (batch, outputs)))


def _real_rows(batch: Examples, outputs: dict[str, jax.Array]) -> Predicted:
    """Returns both without the rows that fill the last batch, and the batch without weights."""
    real = batch['weight'] > 0
    rows = {name: x[real] for name, x in batch.items() if name != 'weight'}
    return rows, {name: np.asarray(x)[real] for name, x in outputs.items()}
