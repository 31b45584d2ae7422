"""Language models: full size without a byte allocated, mixtures in the loss, and on a mesh."""

import dataclasses
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import describe, identity, sharding
from bigjax import experiment as experiments
from bigjax.models import gpt
from bigjax.nn.moe import Routing
from bigjax.recipes.sizes import override
from bigjax.state import setup
from bigjax.strategy import Remat
from bigjax.tasks.causal_lm import cached_decoder, causal_lm

ROUTING = Routing(experts=4, experts_per_token=2, capacity_factor=0.75)
MODEL = gpt.GPT(
    vocab_size=12, context_length=8, depth=2, heads=2, width=8, routing=ROUTING, scan=True
)
BATCH = {'tokens': np.random.default_rng(0).integers(0, 12, (8, 9), np.int32)}


def task(model=MODEL):
    return causal_lm(
        model,
        length=8,
        token_bytes_V=np.ones(12),
        forward_flops=1,
        decoder=cached_decoder(model, 8),
    )


@pytest.fixture(scope='module')
def params():
    params = jax.jit(task().init)(jax.random.key(0))['params']
    return jax.tree.map(lambda x: 10 * x, params)


@pytest.fixture(scope='module')
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp('text') / 'text.txt'
    file.write_text(''.join(f'line {i} of a text\n' for i in range(500)))
    return {'dataset': f'files:{file}', 'data_dir': str(file.parent)}


# Layers are scanned where there are many of them: that is what takes time to trace.
@pytest.mark.parametrize(
    ('name', 'knobs', 'parameters', 'mesh'),
    [
        ('gpt2', {'size': '1.5B', 'scan': True}, 1_557_611_200, 'fsdp=8'),
        ('gpt3', {'size': '175B', 'scan': True, 'batch': 1568}, 174_604_259_328, 'tensor=8'),
        ('llama', {'size': '1B'}, 1_235_814_400, 'fsdp=2,tensor=4'),
        ('llama', {'size': '405B', 'scan': True}, 405_853_388_800, 'tensor=8'),
        ('llama', {'size': '8B', 'scan': True, 'experts': 8}, 47_491_321_856, 'fsdp=2,tensor=4'),
        ('llama', {'size': '70B', 'scan': True, 'rank': 8}, 70_657_253_376, 'fsdp=2,tensor=4'),
    ],
)
def test_full_size_is_described_and_split(name, knobs, parameters, mesh, text):
    knobs = {**knobs, **text, 'mesh': mesh, 'eval_batch': 32}
    plan = setup(experiments.load(name, **knobs))
    known = identity.identity(name, experiments.find(name), knobs)
    told = describe.describe(experiments.load(name, **knobs), known, plan, Path('nowhere'))
    assert told['parameters'] == parameters
    # Parameters and two moments (with adapters, theirs alone) over eight devices, but for norms.
    moments = 0 if knobs.get('rank') else 2
    whole = 4 * (1 + moments) * parameters
    assert whole / 8 <= told['state_bytes_per_device'] < 1.05 * whole / 8 + 4e8 * (moments == 0)
    # Six operations a parameter and token, and those of attention.
    active = parameters if 'experts' not in knobs else 13e9
    assert 0.8 < told['flops_per_step'] / (6 * active * told['tokens_per_step']) < 1.5


def test_knobs_that_are_not_zero_override_the_published():
    assert override({'depth': 12, 'width': 768}, depth=0, width=16) == {'depth': 12, 'width': 16}


@pytest.mark.parametrize('name', ['gpt2', 'gpt3', 'llama'])
def test_sizes_and_choices_are_those_of_the_model(name):
    knobs = experiments.knobs(experiments.find(name))
    model = __import__(f'bigjax.models.{name.rstrip("23")}', fromlist=['_'])
    assert knobs['size'].type == tuple(getattr(model, f'{name.upper()}_SIZES', None) or model.SIZES)
    assert knobs['remat'].type == typing.get_args(Remat)
    assert {'rank', 'alpha', 'experts', 'experts_per_token', 'scan', 'dtype'} <= knobs.keys()


def test_losses_and_metrics_of_a_mixture_reach_the_task(params):
    key = jax.random.key(0)
    loss = lambda model, train: task(model).loss(params, {}, BATCH, key, train)  # noqa: E731
    total, (extra, metrics) = loss(MODEL, True)
    nats = metrics['loss'][0] / metrics['loss'][1]
    # The mean over layers of each, times its weight, times two layers.
    own = {name: metrics[name][0] / metrics[name][1] for name in ('load_balance', 'router_z')}
    weighted = ROUTING.load_balance * own['load_balance'] + ROUTING.router_z * own['router_z']
    assert total == pytest.approx(float(nats + 2 * weighted), rel=1e-5)
    assert metrics['dropped'][1] == 2 * 8 * 8 * 2
    assert not extra
    value, (_, evaluated) = loss(MODEL, False)
    assert set(evaluated) == {'loss', 'bits_per_byte'}
    assert value == pytest.approx(float(nats), rel=1e-5)
    free = dataclasses.replace(ROUTING, load_balance=0.0, router_z=0.0)
    assert loss(MODEL.clone(routing=free), True)[0] == pytest.approx(float(nats), rel=1e-5)


def test_the_router_learns(params):
    def loss(params):
        return task().loss(params, {}, BATCH, jax.random.key(0), True)[0]

    grads = jax.jit(jax.grad(loss))(params)
    assert all(np.all(x.any(tuple(range(1, x.ndim)))) for x in jax.tree.leaves(grads['blocks']))


def test_experts_on_a_mesh_give_the_same_loss(params):
    mesh = sharding.make_mesh('expert=2,fsdp=2,tensor=2')
    run = jax.jit(lambda p, batch: task().loss(p, {}, batch, jax.random.key(0), True)[0])
    want = run(params, BATCH)

    def place(path, x):
        spec = sharding.spec_for(sharding.path_string(path), x.shape, gpt.RULES, mesh)
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    placed = jax.tree_util.tree_map_with_path(place, params)
    kernel_LECM = placed['blocks']['moe']['experts']['up']['kernel']
    assert kernel_LECM.sharding.shard_shape(kernel_LECM.shape) == (2, 2, 4, 16)
    batch = sharding.shard_batch(BATCH, sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        assert run(placed, batch) == pytest.approx(float(want), rel=1e-5)


def test_tokens_that_the_tokenizer_does_not_know_are_never_drawn(params):
    tokens_BT = BATCH['tokens'][:1, :1]
    logits_BTV, _ = cached_decoder(MODEL, 8, 5).step(params, tokens_BT, MODEL.init_cache(1))
    assert logits_BTV.shape == (1, 1, 5)
    logits_BTV, _ = cached_decoder(MODEL, 8).step(params, tokens_BT, MODEL.init_cache(1))
    assert logits_BTV.shape == (1, 1, 12)
    assert jnp.isfinite(logits_BTV).all()
