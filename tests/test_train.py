"""The whole of training on a toy: learning, resuming, meshes, compilation, stopping."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest
import toy
from jax import numpy as jnp

from bigjax import state as states
from bigjax import train
from bigjax.checkpoint import Checkpoints
from bigjax.data.shuffle import shuffled
from bigjax.metrics import read_metrics
from bigjax.models.mlp import MLP
from bigjax.state import first_state, make_init, setup
from bigjax.tasks.classification import classification

MESHES = ('data=8', 'data=4,fsdp=2', 'data=2,fsdp=2,tensor=2', 'fsdp=8')


def losses(workdir):
    """Returns [(step, loss)] of training in the order written."""
    records = read_metrics(workdir / 'metrics.jsonl')
    return [(r['step'], r['loss']) for r in records if 'set' not in r]


def evaluations(workdir):
    return [r for r in read_metrics(workdir / 'metrics.jsonl') if 'set' in r]


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    """A run of 24 steps that nothing interrupts: (outcome, its workdir)."""
    workdir = tmp_path_factory.mktemp('straight')
    return toy.fit(workdir, steps=24, eval_every=5), workdir


def test_loss_falls(tmp_path):
    outcome = toy.fit(tmp_path, steps=150, batch=32, log_every=1, dropout=0.0)
    first, last = (np.mean([loss for _, loss in losses(tmp_path)[part]])
                   for part in (slice(5), slice(-5, None)))  # fmt: skip
    assert last < 0.3 * first
    assert outcome.scores['test']['accuracy'] > 3 / toy.CLASSES


def test_resumed_is_straight(straight, tmp_path, capsys):
    toy.fit(tmp_path, steps=7, eval_every=5)
    outcome = toy.fit(tmp_path, steps=24, eval_every=5)
    assert 'going on from step 7' in capsys.readouterr().err
    assert toy.digest(outcome.state) == toy.digest(straight[0].state)
    assert losses(tmp_path) == losses(straight[1])


@pytest.mark.slow
def test_killed_at_a_random_step_resumed_is_straight(straight, tmp_path, capsys):
    draw = np.random.default_rng(20261122)
    knobs = {'steps': 24, 'eval_every': 5, 'save_every': 2}
    for die_at in draw.integers(9, 13, 2).tolist():
        child = toy.start(tmp_path, knobs, die_at=die_at, delay=0.02)
        errors = child.communicate(timeout=120)[1]
        assert child.returncode == -9, errors
    assert 'going on from step' in errors
    outcome = toy.fit(tmp_path, **knobs)
    assert 'going on from step' in capsys.readouterr().err
    assert toy.digest(outcome.state) == toy.digest(straight[0].state)
    assert losses(tmp_path) == losses(straight[1])  # none repeated, none lost
    assert [step for step, _ in losses(tmp_path)] == list(range(1, 25))
    assert evaluations(tmp_path) == evaluations(straight[1])


@pytest.fixture(scope='module')
def one_device(tmp_path_factory):
    """Losses of the toy on one device."""
    workdir = tmp_path_factory.mktemp('one')
    child = toy.start(workdir, {}, devices=1)
    output, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    assert json.loads(output)['step'] == 8
    return losses(workdir)


@pytest.mark.parametrize('mesh', MESHES)
def test_losses_do_not_depend_on_the_mesh(mesh, one_device, tmp_path):
    outcome = toy.fit(tmp_path, mesh=mesh)
    np.testing.assert_allclose(losses(tmp_path), one_device, rtol=0, atol=1e-5)
    kernel = outcome.state.params['hidden']['kernel']
    assert kernel.sharding.is_fully_replicated == (mesh == 'data=8')


def test_restored_on_another_mesh(straight, tmp_path):
    toy.fit(tmp_path, steps=7, mesh='data=2,fsdp=2,tensor=2')
    toy.fit(tmp_path, steps=24, mesh='fsdp=8')
    np.testing.assert_allclose(losses(tmp_path), losses(straight[1]), rtol=0, atol=1e-4)


def test_compiled_once(tmp_path, caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        toy.fit(tmp_path, steps=6, eval_every=2, save_every=3)
    compiled = [r.getMessage() for r in caplog.records if 'Compiling' in r.getMessage()]
    assert len([m for m in compiled if 'train_step' in m]) == 1
    assert len([m for m in compiled if 'eval_step' in m]) == 1


def test_steps_in_one_call_are_the_same_steps(straight, tmp_path):
    outcome = toy.fit(tmp_path, steps=24, steps_per_call=4)
    np.testing.assert_allclose(losses(tmp_path), losses(straight[1]), rtol=1e-5)
    expected = toy.leaves(straight[0].state.params)
    for path, leaf in toy.leaves(outcome.state.params).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-4, atol=1e-5, err_msg=path)


def stepped(accumulate):
    """Returns state and metrics after one step on rows of which half weigh nothing."""
    experiment, _ = toy.build(accumulate=accumulate, optimizer='sgd', ema=0.0, peak_lr=1.0)
    task = classification(
        MLP(toy.CLASSES, widths=(32,)),
        inputs='features',
        example=jax.ShapeDtypeStruct((toy.FEATURES,), jnp.float32),
        class_names=experiment.task.class_names,
        forward_flops=0,
        unit='rows',
    )
    experiment = dataclasses.replace(experiment, task=task)
    batch = experiment.data.train.take(np.arange(16))
    batch['weight'] = np.linspace(-3, 5, 16).clip(0).astype(np.float32)
    state = make_init(task, experiment.optimizer, 0)()
    stacked = {name: value[None] for name, value in batch.items()}
    return jax.jit(train.make_train_step(experiment))(state, stacked)


@pytest.mark.parametrize('few', [0, 10**9])
def test_the_first_state_is_drawn_alike_however_it_is_compiled(monkeypatch, few):
    monkeypatch.setattr(states, 'FEW_PARAMETERS', few)
    experiment, _ = toy.build(mesh='data=2,fsdp=2,tensor=2')
    plan = setup(experiment)
    with jax.set_mesh(plan.mesh):
        first = first_state(experiment, plan)
    plain = make_init(experiment.task, experiment.optimizer, experiment.run.seed)()
    for path, leaf in toy.leaves(plain).items():
        np.testing.assert_allclose(toy.leaves(first)[path], leaf, rtol=1e-5, atol=1e-7)


def test_accumulated_is_the_large_batch():
    (state, metrics), (expected_state, expected) = stepped(4), stepped(1)
    for path, leaf in toy.leaves(state.params).items():
        expected_leaf = toy.leaves(expected_state.params)[path]
        np.testing.assert_allclose(leaf, expected_leaf, rtol=1e-5, atol=1e-6, err_msg=path)
    for name in ('loss', 'accuracy', 'grad_norm'):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, err_msg=name)


def spoilt(**knobs):
    """Returns the toy with a row that is not a number, first read by step 4."""
    experiment, identity = toy.build(steps=6, **knobs)
    features_NF = experiment.data.train.arrays['features'].copy()
    features_NF[shuffled(3 * 16, 1, len(features_NF), seed=0), 5] = np.nan
    records = toy.Rows({**experiment.data.train.arrays, 'features': features_NF})
    data = dataclasses.replace(experiment.data, train=records)
    return dataclasses.replace(experiment, data=data), identity


def test_not_finite_stops_with_the_last_good_checkpoint_kept(tmp_path):
    with pytest.raises(FloatingPointError) as error:
        train.train(*spoilt(save_every=1), tmp_path)
    assert str(error.value) == (
        'step 4: loss is nan; not finite: gradient of head/bias and 3 more. The last good '
        'checkpoint is kept. Try a lower --peak_lr, --clip=1, or --nonfinite=skip.'
    )
    assert max(Checkpoints(tmp_path, keep=2).steps()) == 3


def test_not_finite_is_skipped_if_told_to(tmp_path):
    outcome = train.train(*spoilt(nonfinite='skip'), tmp_path)
    assert [step for step, loss in losses(tmp_path) if loss is None] == [4]
    assert all(np.isfinite(leaf).all() for leaf in toy.leaves(outcome.state).values())
    assert np.isfinite(outcome.scores['test']['loss'])


def test_early_stop_keeps_the_best_and_stays_stopped(tmp_path):
    knobs = {'steps': 40, 'eval_every': 1, 'patience': 3, 'keep': 1, 'ema': 0.0, 'peak_lr': 0.3}
    outcome = toy.fit(tmp_path, **knobs)
    by_step = {r['step']: r['loss'] for r in evaluations(tmp_path)}
    best = min(by_step, key=by_step.get)
    assert outcome.step == best + 3 < 40
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert (checkpoints.steps(), checkpoints.best()) == ([best, outcome.step], best)
    again = toy.fit(tmp_path, **knobs)
    assert again.step == outcome.step
    assert again.scores['test']['loss'] == pytest.approx(by_step[outcome.step])
    assert len(losses(tmp_path)) == outcome.step


def test_a_score_that_is_not_a_number_is_never_the_best(tmp_path, monkeypatch):
    scores = iter([np.nan, 2.0, 1.0, 3.0])
    monkeypatch.setattr(train.Evaluator, 'badness', lambda *_: next(scores))
    toy.fit(tmp_path, steps=4, eval_every=1, keep=1)
    assert Checkpoints(tmp_path, keep=1).best() == 3


def test_profile_traces_the_steps_asked_for(tmp_path):
    toy.fit(tmp_path, steps=4, profile_steps='1:3')
    assert list(tmp_path.glob('profile/**/*.xplane.pb'))
