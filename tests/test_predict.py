"""Predictions: every real row once and in order, scored as one, on one host or two."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from bigjax import actions, optimizers, train
from bigjax.evaluate import Evaluator
from bigjax.experiment import UsageError
from bigjax.metrics import read_metrics
from bigjax.options import Kept
from bigjax.predict import Predictor
from bigjax.state import first_state, setup


def with_scores(**knobs):
    """The toy, with its predictions scored."""
    experiment, identity = toy.build(**knobs)
    return toy.scored(experiment), identity


@pytest.mark.parametrize('mesh', ['data=-1', 'data=2,fsdp=2,tensor=2'])
def test_every_real_row_once_and_in_order(mesh):
    experiment, _ = with_scores(mesh=mesh)
    plan = setup(experiment)
    records = experiment.data.evals['test']
    assert len(records) % experiment.run.batch  # ragged
    with jax.set_mesh(plan.mesh):
        state = first_state(experiment, plan)
        pairs = list(Predictor(experiment, plan.mesh)(state.params, state.extra, records))
        scores = Evaluator(experiment, plan)(state, score=True)
    for name in ('features', 'label'):
        rows = np.concatenate([batch[name] for batch, _ in pairs])
        np.testing.assert_array_equal(rows, records.arrays[name])
    labels = np.concatenate([outputs['label'] for _, outputs in pairs])
    np.testing.assert_array_equal(labels, records.arrays['label'])
    assert scores['test']['rows'] == len(records)
    assert scores['test']['right'] == 1
    assert scores['test']['loss'] > 0


def evaluated(workdir):
    return {r['step']: r for r in read_metrics(workdir / 'metrics.jsonl') if 'set' in r}


def test_scores_are_recorded_at_the_end_and_on_demand(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['launch.py'])
    experiment, identity = with_scores(eval_every=4)
    assert actions.run('train', experiment, identity, tmp_path) == 0
    records = evaluated(tmp_path)
    assert 'rows' not in records[4]  # Predictions cost more than a loss.
    assert records[8]['rows'] == 37
    told = capsys.readouterr().err
    labels = experiment.data.evals['test'].arrays['label']
    order = labels @ np.arange(1, 38)
    assert f'rows 37.0000, right 1.0000, order {order}.0000' in told
    assert told.count('test example') == actions.EXAMPLES
    assert f'test example\n{labels[0]} as {labels[0]}\n' in told
    # An earlier checkpoint is scored where it is asked for.
    actions.run('evaluate', experiment, identity, tmp_path, Kept(checkpoint='4'))
    assert 'test after step 4\n' in (told := capsys.readouterr().err)
    assert 'rows 37.0000, right 1.0000' in told


def test_a_monitored_score_is_taken_at_every_evaluation(tmp_path):
    experiment, identity = with_scores(eval_every=4, monitor='test/right')
    outcome = train.train(experiment, identity, tmp_path)
    assert [record['right'] for record in evaluated(tmp_path).values()] == [1, 1]
    evaluator = Evaluator(experiment, setup(experiment))
    assert evaluator.badness(outcome.scores) == -1  # High is good.


def test_an_unknown_score_cannot_be_monitored():
    experiment, _ = with_scores(monitor='test/blue')
    with pytest.raises(UsageError) as error:
        Evaluator(experiment, setup(experiment))
    assert str(error.value) == (
        '--monitor=test/blue: must be one of test/accuracy, test/macro_f1, test/loss, test/rows, '
        'test/right, test/order; try --monitor=test/accuracy'
    )


def test_scores_of_other_names_are_an_error():
    experiment, _ = with_scores()
    experiment = dataclasses.replace(experiment, score_names=('rows',))
    plan = setup(experiment)
    with jax.set_mesh(plan.mesh):
        state = first_state(experiment, plan)
        with pytest.raises(
            ValueError, match=r"score gives \['order', 'right', 'rows'\], score_names"
        ):
            Evaluator(experiment, plan)(state, score=True)


def test_the_weight_average_is_what_predicts():
    experiment, _ = with_scores()
    seen = experiment.task._replace(
        predict=lambda params, extra, batch: {
            'value': jnp.broadcast_to(jax.tree.leaves(params)[0].ravel()[:1], batch['label'].shape)
        }
    )
    experiment = dataclasses.replace(
        experiment,
        task=seen,
        score=lambda pairs: {'value': float(next(pairs)[1]['value'][0])},
        score_names=('value',),
    )
    plan = setup(experiment)
    with jax.set_mesh(plan.mesh):
        state = first_state(experiment, plan)
        average = jax.tree.map(lambda x: 3 * x + 1, state.params)
        state = state._replace(opt_state=state.opt_state._replace(average=average))
        scores = Evaluator(experiment, plan)(state, score=True)
    expected = jax.tree.leaves(optimizers.evaluation_params(None, state.opt_state))[0].ravel()[0]
    assert scores['test']['value'] == pytest.approx(float(expected))
