"""Every file in experiments/: full size in shapes, and two real steps of a small one."""

import jax
import numpy as np
import pytest

from bigjax import experiment as experiments
from bigjax import identity as identities
from bigjax import sharding, train
from bigjax.data import pipeline
from bigjax.metrics import read_metrics
from bigjax.models import inception
from bigjax.run import UsageError
from bigjax.state import first_state, make_init, setup

NAMES = sorted(experiments.names())
# What makes an experiment small; each sets those of these knobs that it has.
SMALL = {'depth': 1, 'width': 16, 'heads': 2, 'seq': 16, 'hidden': 16, 'layers': 1, 'embed': 16}
# Depths are a closed list there.
SMALLEST = {
    'inception': {'width': 4},
    'resnet': {'depth': 20, 'width': 8},
    'vgg': {'depth': 11, 'width': 4},
}
# Models in which a tensor axis would only repeat the work.
UNSPLIT = ['lstm_classifier']
# One experiment of each model that has attention with an implementation to choose.
TRANSFORMERS = ['bert', 'gpt_stdlib', 'llama', 'transformer_translation', 'vit']
CNNS = ['alexnet', 'cnn', 'inception', 'resnet', 'vgg']
# At the size of ImageNet, the numbers of parameters that are published.
IMAGENET = {'image_size': 224, 'channels': 3, 'num_classes': 1000, 'normalize': 'half'}
PUBLISHED = [
    ('alexnet', {'width': 0, 'hidden': 0}, 61_100_840),
    ('vgg', {'depth': 16, 'width': 0, 'hidden': 0, 'batch_norm': False}, 138_357_544),
    ('inception', {'version': 1, 'width': 0, 'auxiliary': 0.0}, 6_624_904),
    ('inception', {'version': 3, 'width': 0, 'image_size': 299}, 27_161_264),
    ('resnet', {'depth': 50}, 25_557_032),
    ('vit', {'variant': 'B/16', 'depth': 0, 'heads': 0, 'width': 0, 'pool': 'token',
             'positions': 'learned'}, 86_567_656),
]  # fmt: skip


def cut(name, monkeypatch):
    """Leaves out what no knob does and takes long to compile: blocks of the same kind."""
    if name == 'inception':
        own = inception.SIZES[1]
        stages = tuple(stage[:1] for stage in own.stages)
        monkeypatch.setitem(inception.SIZES, 1, own._replace(stages=stages, auxiliary=((1, 0),)))


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp('data')


@pytest.fixture(scope='module')
def words(tmp_path_factory):
    """A small text, so that no test prepares a whole corpus."""
    file = tmp_path_factory.mktemp('text') / 'text.txt'
    file.write_text(''.join(f'line {i} of a text\n' for i in range(500)))
    return f'files:{file}'


def load(name, data_dir, words, **knobs):
    """Returns the experiment, on a small text where its default is a large one, and identity."""
    function = experiments.find(name)
    known = experiments.knobs(function)
    knobs = {'data_dir': str(data_dir), **knobs}
    if known['dataset'].default == 'stdlib':
        knobs['dataset'] = words
    knobs = {knob: value for knob, value in knobs.items() if knob in known}
    return experiments.build(function, knobs), identities.identity(name, function, knobs)


def test_there_are_experiments():
    assert {'gpt_stdlib', 'cnn', 'resnet'} <= set(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_docstring_tells_command_and_knobs_have_help(name):
    function = experiments.find(name)
    module_doc = __import__(function.__module__, fromlist=['_']).__doc__
    assert f'python launch.py --experiment={name}' in module_doc
    known = experiments.knobs(function)  # raises where a knob has no help, type or default
    assert {'steps', 'batch', 'seed', 'eval_every', 'save_every', 'log_every'} <= known.keys()
    for knob in known.values():
        assert isinstance(knob.default, int | float | bool | str)
        assert 0 < len(knob.help) <= 100


@pytest.mark.parametrize('mesh', ['data=8', 'data=2,fsdp=2,tensor=2'])
@pytest.mark.parametrize('name', NAMES)
def test_full_size_has_a_place_for_every_parameter(name, mesh, data_dir, words):
    experiment, _ = load(name, data_dir, words)
    abstract = jax.eval_shape(make_init(experiment.task, experiment.optimizer, 0))
    placed = sharding.make_mesh(mesh)
    if name in UNSPLIT and placed.shape['tensor'] > 1:
        with pytest.raises(UsageError, match='tensor=2 shares out'):
            sharding.state_shardings(abstract, experiment.rules, placed)
        return
    shardings = sharding.state_shardings(abstract, experiment.rules, placed)
    assert jax.tree.leaves(abstract.params)
    if placed.shape['tensor'] > 1:
        whole = sharding.bytes_per_device(abstract, jax.tree.map(
            lambda _: sharding.replicated(placed), abstract))  # fmt: skip
        # At least half of the state is split, moments as well as parameters.
        assert sharding.bytes_per_device(abstract, shardings) < 0.7 * whole


@pytest.mark.parametrize(('name', 'knobs', 'parameters'), PUBLISHED)
def test_published_form_has_the_published_number_of_parameters(
    name, knobs, parameters, data_dir, words
):
    experiment, _ = load(name, data_dir, words, **{**IMAGENET, **knobs})
    abstract = jax.eval_shape(make_init(experiment.task, experiment.optimizer, 0))
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract.params)) == parameters
    mesh = sharding.make_mesh('data=2,fsdp=2,tensor=2')
    sharding.state_shardings(abstract, experiment.rules, mesh)  # raises where no rule matches


@pytest.mark.parametrize(
    'name', [pytest.param(n, marks=[pytest.mark.slow] * (n in SMALLEST)) for n in NAMES]
)
def test_two_steps_of_a_small_one(name, data_dir, words, tmp_path, monkeypatch):
    cut(name, monkeypatch)
    small = {'steps': 2, 'batch': 8, 'warmup': 0, 'log_every': 1, 'eval_batch': 64}
    small |= {**SMALL, **SMALLEST.get(name, {})}
    experiment, identity = load(name, data_dir, words, **small)
    outcome = train.train(experiment, identity, tmp_path)
    assert outcome.step == 2
    records = list(read_metrics(tmp_path / 'metrics.jsonl'))
    assert [r['step'] for r in records if 'set' not in r] == [1, 2]
    assert all(r['loss'] > 0 for r in records)
    assert {r['set'] for r in records if 'set' in r} == set(experiment.data.evals)


def losses_of(name, impls, data_dir, words, **knobs):
    """Returns the losses of a few steps at full rate by each implementation of one knob."""
    (knob, names), losses = impls, {}
    for impl in names:
        small = {**SMALL, **SMALLEST.get(name, {}), 'steps': 6, 'batch': 8, 'warmup': 0, **knobs}
        experiment, _ = load(name, data_dir, words, **small, **{knob: impl})
        plan = setup(experiment)
        batches = pipeline.train_batches(
            experiment.data.train, batch=8, seed=0, augment=experiment.augment
        )
        step = jax.jit(train.make_train_step(experiment))
        with jax.set_mesh(plan.mesh):
            state, losses[impl] = first_state(experiment, plan), []
            for n in range(6):
                batch = {key: value[None] for key, value in batches[n].items()}
                state, metrics = step(state, batch)
                losses[impl].append(float(metrics['loss'][0]))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize('name', TRANSFORMERS)
def test_every_implementation_of_attention_trains_to_the_same_losses(name, data_dir, words):
    # Kernels are interpreted, where there is no TPU.
    impls = 'attention', ('reference', 'xla', 'tpu')
    losses = losses_of(name, impls, data_dir, words, peak_lr=0.05, dropout=0.0)
    np.testing.assert_allclose(losses['xla'], losses['reference'], rtol=1e-5)
    np.testing.assert_allclose(losses['tpu'], losses['reference'], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', CNNS)
def test_every_implementation_of_convolution_trains_to_the_same_losses(
    name, data_dir, words, monkeypatch
):
    cut(name, monkeypatch)
    # To interpret the kernels of a deep model takes minutes.
    names = ('reference', 'xla', 'tpu') if name == 'cnn' else ('reference', 'xla')
    losses = losses_of(name, ('conv', names), data_dir, words, peak_lr=0.01, dropout=0.0)
    for impl in names[1:]:
        np.testing.assert_allclose(losses[impl], losses['reference'], rtol=1e-4)
