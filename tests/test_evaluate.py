"""Evaluation: exact means on ragged data, whatever the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from sklearn.metrics import f1_score

from bigjax.data.pipeline import ArrayRecords
from bigjax.evaluate import Evaluator, evaluate
from bigjax.experiment import Data, Experiment, Run, UsageError
from bigjax.optimizers import Optim, make_optimizer
from bigjax.state import make_init, setup
from bigjax.tasks.classification import classification

F, C = 3, 4


class Linear(nn.Module):
    """Logits are an affine function of the features."""

    @nn.compact
    def __call__(self, x_BF, *, train):
        return nn.Dense(C)(x_BF)


def records(size, seed):
    random = np.random.default_rng(seed)
    features = random.normal(size=(size, F)).astype(np.float32)
    return ArrayRecords(
        {'features': features, 'label': random.integers(0, C, size).astype(np.int32)}
    )


def make(batch=8, eval_batch=0, monitor='validation/loss', ema=0.0):
    task = classification(
        Linear(),
        inputs='features',
        example=jax.ShapeDtypeStruct((F,), jnp.float32),
        class_names=tuple('abcd'),
        forward_flops=1,
        unit='rows',
        label_smoothing=0.3,  # Of training only.
    )
    optimizer, schedule = make_optimizer(Optim(ema=ema), steps=1000)
    return Experiment(
        task=task,
        optimizer=optimizer,
        schedule=schedule,
        data=Data(
            train=records(8, 0),
            evals={'validation': records(37, 1), 'test': records(3, 2)},
            card=None,
        ),
        rules=(('.*', 'largest'),),
        run=Run(steps=1, batch=batch, eval_batch=eval_batch, monitor=monitor),
    )


def expected(data, params):
    """Loss, accuracy and confusion over the whole set at once, in float64."""
    dense = {name: np.float64(value) for name, value in params['Dense_0'].items()}
    logits = np.float64(data.arrays['features']) @ dense['kernel'] + dense['bias'][None]
    label = data.arrays['label']
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    confusion = np.zeros((C, C))
    np.add.at(confusion, (label, logits.argmax(-1)), 1)
    loss = -log_probability[np.arange(len(label)), label].mean()
    return loss, np.mean(logits.argmax(-1) == label), confusion


@pytest.mark.parametrize(('batch', 'eval_batch'), [(8, 0), (16, 0), (8, 40), (64, 0)])
def test_ragged_data_is_evaluated_exactly(batch, eval_batch):
    experiment = make(batch, eval_batch)
    plan = setup(experiment)
    with jax.set_mesh(plan.mesh):
        init = make_init(experiment.task, experiment.optimizer, seed=0)
        state = jax.jit(init, out_shardings=plan.shardings)()
        scores = Evaluator(experiment, plan)(state)
    assert list(scores) == ['validation', 'test']
    for name, data in experiment.data.evals.items():
        loss, accuracy, confusion = expected(data, jax.device_get(state.params))
        np.testing.assert_allclose(scores[name]['loss'], loss, rtol=1e-6)
        np.testing.assert_allclose(scores[name]['accuracy'], accuracy, rtol=1e-12)
        np.testing.assert_array_equal(scores[name]['confusion'], confusion)
        truth, guess = np.nonzero(confusion)
        f1 = f1_score(truth, guess, average='macro', sample_weight=confusion[truth, guess])
        np.testing.assert_allclose(scores[name]['macro_f1'], f1, rtol=1e-12)


def test_macro_f1_can_be_monitored_and_is_better_high():
    evaluator = Evaluator(experiment := make(monitor='test/macro_f1'), setup(experiment))
    assert evaluator.badness({'test': {'macro_f1': np.float64(0.5)}}) == -0.5


def test_the_weight_average_is_evaluated():
    experiment = make(ema=0.5)
    plan = setup(experiment)
    with jax.set_mesh(plan.mesh):
        state = make_init(experiment.task, experiment.optimizer, seed=0)()
        average = jax.tree.map(lambda x: 3 * x + 1, state.params)
        state = state._replace(opt_state=state.opt_state._replace(average=average))
        scores = Evaluator(experiment, plan)(state)
    loss, *_ = expected(experiment.data.evals['validation'], jax.device_get(average))
    np.testing.assert_allclose(scores['validation']['loss'], loss, rtol=1e-6)


def test_sums_and_weights_add_up_over_batches():
    # A mean of means would be 3; batches whose weights are all zero change nothing.
    batches = [(8.0, 8.0), (5.0, 1.0), (0.0, 0.0)]
    step = lambda params, extra, batch: {  # noqa: E731
        'loss': batch,
        'confusion': (batch[0] * np.eye(2), 1.0),
    }
    scores = evaluate(step, None, None, batches)
    assert scores['loss'] == 13 / 9
    np.testing.assert_array_equal(scores['confusion'], 13 * np.eye(2))


def test_sums_do_not_drift():
    # In float32, 2^24 + 1 is 2^24.
    batches = [(np.float32(2**24), np.float32(2**24))] + [(np.float32(1), np.float32(1))] * 8
    scores = evaluate(lambda params, extra, batch: {'loss': (batch[0], 1.0)}, None, None, batches)
    assert scores['loss'] == (2**24 + 8) / 9


@pytest.mark.parametrize('monitor', ['validation/los', 'loss', 'train/loss', ''])
def test_what_cannot_be_monitored(monitor):
    experiment = make(monitor=monitor)
    with pytest.raises(UsageError) as error:
        Evaluator(experiment, setup(experiment))
    assert str(error.value) == (
        f'--monitor={monitor}: must be one of validation/accuracy, validation/macro_f1, '
        'validation/loss, test/accuracy, test/macro_f1, test/loss; '
        'try --monitor=validation/accuracy'
    )


@pytest.mark.parametrize(
    ('monitor', 'badness'), [('validation/loss', 0.5), ('test/accuracy', -0.75)]
)
def test_badness_is_low_for_what_is_good(monitor, badness):
    experiment = make(monitor=monitor)
    evaluator = Evaluator(experiment, setup(experiment))
    scores = {'validation': {'loss': np.float64(0.5)}, 'test': {'accuracy': np.float64(0.75)}}
    assert evaluator.badness(scores) == badness


def test_a_batch_that_the_mesh_does_not_divide_is_told_first():
    with pytest.raises(UsageError, match=r'^--eval_batch=12: must be a positive multiple of 8'):
        setup(make(eval_batch=12))


def test_nothing_is_compiled_to_prepare():
    experiment = make()
    compiled = []
    plan = setup(experiment)
    listener = lambda name, *_, **__: compiled.append(name)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        Evaluator(experiment, plan)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert not [name for name in compiled if 'backend_compile' in name]
