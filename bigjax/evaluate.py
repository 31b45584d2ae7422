"""Exact evaluation: sums and weights over whole data sets, ragged ends included."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from bigjax import losses, optimizers, sharding
from bigjax.data import pipeline
from bigjax.deterministic import sum_over_shards
from bigjax.experiment import Experiment, UsageError
from bigjax.predict import Predictor
from bigjax.state import Setup, TrainState
from bigjax.task import Batch, Metrics

MACRO_F1 = 'macro_f1'
# Metrics that are better high; all others are better low.
HIGHER_IS_BETTER = ('accuracy', 'top_5_accuracy', 'next_accuracy', MACRO_F1)
# Counts, which are summed over the data, not averaged; their score is added.
CONFUSION = 'confusion'


def evaluate(
    eval_step: Callable[[Any, Any, Batch], Metrics],
    params: Any,
    extra: Any,
    batches: Iterable[Batch],
) -> dict[str, np.ndarray]:
    """Returns every metric over all batches as sum of sums / sum of weights, in float64.

    A mean of batch means would be wrong where the last batch is short; this is exact.
    """
    totals: dict[str, tuple[Any, Any]] = {}

    def add(metrics: Metrics) -> None:
        for name, (value, weight) in jax.device_get(metrics).items():
            value_sum, weight_sum = totals.get(name, (0.0, 0.0))
            totals[name] = (value_sum + np.float64(value), weight_sum + np.float64(weight))

    previous: Metrics = {}
    for batch in batches:
        current = eval_step(params, extra, batch)
        add(previous)  # The device works on this batch while the one before is read.
        previous = current
    add(previous)
    return {
        name: value if name == CONFUSION else value / np.maximum(weight, 1.0)
        for name, (value, weight) in totals.items()
    }


class Evaluator:
    """Evaluates a train state on every evaluation set of an experiment.

    With a weight average in the optimizer state, the average is evaluated.
    """

    def __init__(self, experiment: Experiment, plan: Setup) -> None:
        """Prepares; nothing is compiled before the first call.

        Raises:
          UsageError: `--monitor` names a set or metric that is not there.
        """
        self._experiment, self._mesh = experiment, plan.mesh

        def metrics(batch: Batch, key: jax.Array, params: Any, extra: Any) -> Metrics:
            return experiment.task.loss(params, extra, batch, key, False)[1][1]

        def eval_step(params: Any, extra: Any, batch: Batch) -> Metrics:
            compute = sum_over_shards(metrics) if experiment.run.deterministic else metrics
            return compute(batch, jax.random.key(0), params, extra)

        self._eval_step = jax.jit(eval_step, out_shardings=sharding.replicated(plan.mesh))
        self._predictor = Predictor(experiment, plan.mesh) if experiment.score else None
        self._set, _, self._metric = experiment.run.monitor.rpartition('/')
        known = self._metrics(metrics, plan)
        if experiment.run.monitor not in known:
            raise UsageError(
                f'--monitor={experiment.run.monitor}: must be one of {", ".join(known)}; '
                f'try --monitor={known[0]}'
            )

    def _metrics(self, compute: Callable[..., Metrics], plan: Setup) -> list[str]:
        """Returns every SET/METRIC, from shapes alone."""
        found = []
        for name, records in self._experiment.data.evals.items():
            row, state = pipeline.eval_batches(records, batch=1)[0], plan.abstract
            metrics = jax.eval_shape(compute, row, jax.random.key(0), state.params, state.extra)
            names = [MACRO_F1 if metric == CONFUSION else metric for metric in metrics]
            found += [f'{name}/{metric}' for metric in (*names, *self._experiment.score_names)]
        return found

    def _scores_at(self, step: int) -> bool:
        """Whether predictions are scored: after the last step, and where training asks for it."""
        run = self._experiment.run
        # Any evaluation may be the last one before an early stop.
        return step >= run.steps or run.patience > 0 or self._metric in self._experiment.score_names

    def __call__(
        self, state: TrainState, *, score: bool | None = None
    ) -> dict[str, dict[str, np.ndarray]]:
        """Returns `{set: {metric: value}}`; a confusion matrix is an array [C, C] of counts.

        Args:
          state: what to evaluate.
          score: whether predictions are made and scored, too, where the experiment says how; None
            does so after the last step, with `--patience`, and where `--monitor` is such a score.
        """
        score = self._scores_at(int(state.step)) if score is None else score
        params = optimizers.evaluation_params(state.params, state.opt_state)
        placed, (part, parts) = sharding.batch_sharding(self._mesh), sharding.batch_part(self._mesh)
        scores = {}
        for name, records in self._experiment.data.evals.items():
            dataset = pipeline.eval_batches(
                records,
                batch=self._experiment.run.eval_batch or self._experiment.run.batch,
                process_index=part,
                process_count=parts,
            )
            batches = pipeline.iterate(
                dataset, place=lambda batch: sharding.shard_batch(batch, placed)
            )
            scores[name] = evaluate(self._eval_step, params, state.extra, batches)
            if CONFUSION in scores[name]:
                scores[name][MACRO_F1] = losses.macro_f1(scores[name][CONFUSION])
            if score and self._predictor:
                scores[name] |= self._predictor.scores(params, state.extra, records)
        return scores

    def badness(self, scores: Mapping[str, Mapping[str, np.ndarray]]) -> float:
        """Returns the monitored metric, negated if it is better high."""
        value = float(scores[self._set][self._metric])
        better_high = (*HIGHER_IS_BETTER, *self._experiment.score_names)
        return -value if self._metric in better_high else value
