"""--deterministic: the same bits for any number of devices; and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
import toy
from flax import linen as nn
from jax import numpy as jnp
from jax.sharding import AxisType, Mesh

from bigjax import deterministic, sharding
from bigjax.data.pipeline import ArrayRecords
from bigjax.deterministic import SHARDS, sum_over_shards
from bigjax.metrics import read_metrics
from bigjax.models.gpt import GPT
from bigjax.nn.conv import Conv
from bigjax.nn.linear import Dense
from bigjax.run import Run, UsageError
from bigjax.state import make_init
from bigjax.tasks.causal_lm import causal_lm
from bigjax.tasks.classification import classification
from bigjax.train import make_train_step

ROWS, STEPS = 16, 50
DEGREES = (1, 2, 4, 8)


class Images(nn.Module):
    """A convolution with BatchNorm, one without, dense."""

    @nn.compact
    def __call__(self, x_BHWC, *, train):
        x_BHWC = Conv(8, use_bias=False, name='first')(x_BHWC)
        x_BHWC = nn.relu(nn.BatchNorm(not train, momentum=0.9, name='norm')(x_BHWC))
        x_BHWC = nn.relu(Conv(8, strides=(2, 2), name='second')(x_BHWC))
        return Dense(8, name='head')(x_BHWC.mean((1, 2)))


def changed(task, arrays, **knobs):
    """Returns the toy's run with another model and other data."""
    experiment, _ = toy.build(clip=1.0, **knobs)
    data = dataclasses.replace(experiment.data, train=ArrayRecords(arrays))
    return dataclasses.replace(experiment, task=task, data=data)


def images(**knobs):
    draw = np.random.default_rng(0)
    task = classification(
        Images(),
        inputs='image',
        example=jax.ShapeDtypeStruct((8, 8, 3), jnp.float32),
        class_names=tuple('abcdefgh'),
        forward_flops=0,
        unit='images',
    )
    image = draw.normal(size=(100, 8, 8, 3)).astype(np.float32)
    return changed(task, {'image': image, 'label': draw.integers(0, 8, 100, np.int32)}, **knobs)


def text(**knobs):
    model = GPT(vocab_size=32, context_length=8, depth=1, heads=2, width=16)
    task = causal_lm(
        model, length=8, token_bytes_V=np.ones(32), forward_flops=0, decoder=None, z_loss=1e-4
    )
    # Some tokens are padding: shards weigh differently.
    tokens = np.random.default_rng(0).integers(-8, 32, (100, 9), np.int32)
    return changed(task, {'tokens': tokens}, **knobs)


def features(**knobs):
    return toy.build(clip=1.0, **knobs)[0]


def mesh(**sizes):
    shape = [sizes.get(axis, 1) for axis in sharding.AXES]
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * len(shape))


def trained(experiment, degree):
    """Returns every leaf of the last state, and the metrics of all steps, as bytes."""
    K = experiment.run.steps_per_call
    on = mesh(data=degree)
    with jax.set_mesh(on):
        whole, rows = sharding.replicated(on), sharding.batch_sharding(on, stacked=True)
        init = make_init(experiment.task, experiment.optimizer, 0)
        state = jax.jit(init, out_shardings=whole)()
        step = jax.jit(make_train_step(experiment), out_shardings=whole)
        steps = []
        for n in range(STEPS // K):
            read = experiment.data.train.take(np.arange(n * K * ROWS, (n + 1) * K * ROWS) % 100)
            batches = {k: x.reshape(K, ROWS, *x.shape[1:]) for k, x in read.items()}
            state, metrics = step(state, sharding.shard_batch(batches, rows))
            steps.append(metrics)
        bits = {path: leaf.tobytes() for path, leaf in toy.leaves(state).items()}
        return bits, [{k: np.asarray(v).tobytes() for k, v in m.items()} for m in steps]


def differing(run, other):
    """Returns the paths of leaves and names of metrics that differ."""
    leaves = {path for path, leaf in run[0].items() if leaf != other[0][path]}
    steps = zip(run[1], other[1], strict=True)
    return leaves | {k for ours, theirs in steps for k in ours if ours[k] != theirs[k]}


@pytest.fixture(scope='module')
def alone():
    """Returns by experiment what one device computes, trained once."""
    runs = {}

    def get(make):
        if make not in runs:
            runs[make] = trained(make(deterministic=True), 1)
        return runs[make]

    return get


@pytest.mark.parametrize('degree', DEGREES[1:])
@pytest.mark.parametrize('make', [images, text])
def test_losses_and_weights_have_the_bits_of_one_device(make, degree, alone):
    assert differing(trained(make(deterministic=True), degree), alone(make)) == set()


def test_without_the_flag_bits_differ_but_not_what_is_trained(alone):
    one, eight = trained(text(), 1), trained(text(), 8)
    assert {'loss', 'grad_norm', 'params/embedding', 'opt_state/average/embedding'} <= differing(
        one, eight
    )
    losses, plain = (
        np.array([np.frombuffer(m['loss'], np.float32) for m in run[1]])
        for run in (alone(text), one)
    )
    np.testing.assert_allclose(losses, plain, rtol=0, atol=1e-5)


def test_accumulated_and_looped_steps_keep_their_bits():
    knobs = {'accumulate': 2, 'steps_per_call': 5, 'steps': 50}
    runs = (trained(features(deterministic=True, **knobs), degree) for degree in (4, 8))
    assert differing(*runs) == set()


# ---- The sum ----


def tree(x):
    """The sum of eight numbers that the docstring promises."""
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]))


@pytest.mark.parametrize('degree', DEGREES)
def test_sums_are_taken_over_one_tree(degree):
    draw = np.random.default_rng(0)
    # Of sizes that devices divide, and that they do not; and a sum that is -0.
    batch = {n: draw.normal(size=(16, n)).astype(np.float32) ** 5 for n in (1, 3, 8, 24)}
    batch[2] = np.full((16, 2), -0.0, np.float32)

    def compute(batch, key, scale):
        total = {n: x.sum(0) for n, x in batch.items()}
        return total, jax.random.uniform(key, (5,)), batch[1].shape[0] + 0 * scale

    on = mesh(data=degree)
    with jax.set_mesh(on):
        placed = jax.device_put(batch, sharding.batch_sharding(on))
        sums = jax.jit(sum_over_shards(compute))(placed, jax.random.key(7), jnp.int32(1))
        total, uniform_5, rows = jax.device_get(sums)
    for n, x in batch.items():
        shards = x.reshape(SHARDS, 2, n).sum(1)
        expected = tree(shards)
        assert total[n].tobytes() == expected.tobytes()
        if n == 24:  # So that the order matters.
            assert expected.tobytes() != shards.sum(0).tobytes()
    draws = [jax.random.uniform(jax.random.fold_in(jax.random.key(7), i), (5,)) for i in range(8)]
    assert uniform_5.tobytes() == np.asarray(tree(draws)).tobytes()
    assert rows == 16


def test_no_order_is_left_to_the_backend():
    def compute(batch, key):
        return batch['x'].sum(0)

    on = mesh(data=8)
    with jax.set_mesh(on):
        x = jax.ShapeDtypeStruct((16, 800), jnp.float32, sharding=sharding.batch_sharding(on))
        lowered = jax.jit(sum_over_shards(compute)).lower({'x': x}, jax.random.key(0))
        program = lowered.compile().as_text()
    assert 'all-reduce' not in program
    assert 'reduce-scatter' not in program
    # A half, a quarter and an eighth of the sum are sent, then as much is gathered.
    for part in (400, 200, 100):
        assert f'f32[{part // 100},100]' in program
    assert program.count('collective-permute(') == 3
    assert program.count('all-gather(') == 1


# ---- The run ----


def test_another_number_of_devices_goes_on_with_the_same_bits(tmp_path):
    knobs = {'deterministic': True, 'eval_every': 4}
    straight = toy.fit(tmp_path / 'straight', steps=8, **knobs)
    toy.fit(tmp_path / 'resumed', steps=4, **knobs)
    child = toy.start(tmp_path / 'resumed', {**knobs, 'steps': 8}, devices=2)
    output, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    assert 'going on from step 4' in errors
    assert toy.digest(straight.state) in output
    logs = (read_metrics(tmp_path / name / 'metrics.jsonl') for name in ('straight', 'resumed'))
    # Evaluation's scores, too.
    straight, resumed = (
        [{k: r.get(k) for k in ('step', 'set', 'loss', 'accuracy', 'grad_norm')} for r in log]
        for log in logs
    )
    assert len(straight) == 8 + 2
    assert straight == resumed


@pytest.mark.parametrize(
    ('sizes', 'knobs', 'message'),
    [
        ({'fsdp': 4}, {}, '--mesh=fsdp=4: --deterministic splits 8 shards over data alone, 1, 2, 4 '
                          'or 8; try --mesh=data=4'),
        ({'data': 2, 'tensor': 2}, {}, '--mesh=data=2,tensor=2: --deterministic splits 8 shards '
                                       'over data alone, 1, 2, 4 or 8; try --mesh=data=4'),
        ({'data': 3}, {}, '--mesh=data=3: --deterministic splits 8 shards over data alone, 1, 2, 4 '
                          'or 8; try --mesh=data=1'),
        ({'data': 2}, {'batch': 12}, '--batch=12: must be a multiple of 8, the 8 shards of '
                                     '--deterministic; try --batch=16'),
        ({'data': 2}, {'batch': 24, 'accumulate': 2}, '--batch=24: must be a multiple of 16, the 8 '
                                                      'shards of --deterministic times '
                                                      '--accumulate=2; try --batch=32'),
        ({'data': 2}, {'batch': 16, 'eval_batch': 6}, '--eval_batch=6: must be a multiple of 8, '
                                                      'the 8 shards of --deterministic; try '
                                                      '--eval_batch=8'),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_into_shards_is_refused(sizes, knobs, message):
    with pytest.raises(UsageError) as error:
        deterministic.check(Run(**{'steps': 1, 'batch': 16, **knobs}), mesh(**sizes))
    assert str(error.value) == message
    deterministic.check(Run(steps=1, batch=16), mesh(data=8))


def test_a_run_is_refused_before_it_starts(tmp_path):
    with pytest.raises(UsageError, match='--deterministic splits 8 shards over data alone'):
        toy.fit(tmp_path, deterministic=True, mesh='fsdp=8')
