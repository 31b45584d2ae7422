"""LoRA: starts as the base, trains nothing else, merges and unmerges, whatever form layers have."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from bigjax import lora as loras
from bigjax import sharding
from bigjax.data.card import Card
from bigjax.data.pipeline import ArrayRecords
from bigjax.experiment import Data, Experiment, Run, UsageError
from bigjax.lora import LoRA, merge, unmerge, with_lora
from bigjax.models import llama
from bigjax.nn.moe import Routing
from bigjax.nn.stack import stack_layers
from bigjax.optimizers import Optim, make_optimizer
from bigjax.state import setup
from bigjax.tasks.causal_lm import cached_decoder, causal_lm

LORA = LoRA(rank=2, alpha=6.0)
MODEL = llama.Llama(
    vocab_size=8, context_length=8, depth=2, heads=4, kv_heads=2, width=16, hidden=16
)
BATCH = {'tokens': np.random.default_rng(0).integers(0, 8, (2, 9), np.int32)}


def experiment(model=MODEL, lora=LORA, **optim):
    optimizer, schedule = make_optimizer(Optim(warmup=0, weight_decay=0.1, **optim), steps=4)
    records = ArrayRecords(BATCH)
    return with_lora(
        Experiment(
            task=causal_lm(
                model, length=8, token_bytes_V=np.ones(8), forward_flops=1,
                decoder=cached_decoder(model, 8),
            ),
            optimizer=optimizer,
            schedule=schedule,
            data=Data(train=records, evals={'validation': records}, card=Card('a', 'b')),
            rules=llama.RULES,
            run=Run(steps=4, batch=8, mesh='fsdp=2,tensor=2,data=2', eval_batch=8),
        ),
        lora,
    )  # fmt: skip


def drawn(model=MODEL, lora=LORA):
    """Parameters whose adapters do something."""
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(experiment(model, lora).task.init, jax.random.key(0))['params']
    return jax.tree.map(lambda x: np.float32(draw.normal(size=x.shape, scale=0.3)), shapes)


def loss(task, params):
    return jax.jit(lambda p: task.loss(p, {}, BATCH, jax.random.key(0), True)[0])(params)


@pytest.fixture(scope='module')
def params():
    return drawn()


def test_it_starts_as_the_base_and_without_a_rank_is_nothing():
    plain, adapted = experiment(lora=LoRA()), experiment()
    first = jax.jit(adapted.task.init)(jax.random.key(0))['params']
    assert loss(adapted.task, first) == pytest.approx(float(loss(plain.task, first['base'])))
    a = first['lora']['block_1']['mlp']['up'][loras.A]
    assert a.shape == (16, 2)
    assert a.std() == pytest.approx(16**-0.5, rel=0.5)
    assert adapted.rules[1:] == plain.rules


def test_merged_weights_do_the_same_and_unmerge_to_rounding(params):
    plain, adapted = experiment(lora=LoRA()).task, experiment().task
    merged = merge(params, LORA)
    assert jax.tree.structure(merged) == jax.tree.structure(params['base'])
    assert loss(plain, merged) == pytest.approx(float(loss(adapted, params)), rel=1e-5)
    assert loss(plain, params['base']) != pytest.approx(float(loss(adapted, params)), rel=1e-2)
    back = unmerge(merged, params['lora'], LORA)
    jax.tree.map(np.testing.assert_array_equal, back['lora'], params['lora'])

    def near(x, y, merged):
        # One rounding at the size of the merged weight, one at that of the base.
        ulps = np.spacing(np.maximum(np.abs(y), np.abs(merged)).astype(np.float32))
        assert (np.abs(np.float64(x) - y) <= ulps).all()

    jax.tree.map(near, back['base'], params['base'], merged)


@pytest.mark.parametrize(
    'change', [{'scan': True}, {'routing': Routing(experts=2)}], ids=['scanned', 'experts']
)
def test_layers_that_are_stacked_have_stacked_adapters(change, params):
    model = MODEL.clone(**change)
    lora = dataclasses.replace(LORA, adapt='attention/|mlp/|experts/')
    given = drawn(model, lora)
    if model.scan:  # the numbers of the layers that are not stacked
        want = float(loss(experiment().task, params))
        stacked = {name: stack_layers(tree) for name, tree in params.items()}
        assert loss(experiment(model, lora).task, stacked) == pytest.approx(want, rel=1e-5)
        assert given['lora']['blocks']['attention']['query'][loras.B].shape == (2, 2, 4, 4)
    else:
        assert given['lora']['block_0']['moe']['experts']['up'][loras.A].shape == (2, 16, 2)
    merged = float(loss(experiment(model, LoRA()).task, merge(given, lora)))
    assert loss(experiment(model, lora).task, given) == pytest.approx(merged, rel=1e-5)


def test_only_adapters_are_trained_and_only_they_have_state(params):
    adapted = experiment(clip=1.0)
    state = adapted.optimizer.init(params)
    size = lambda tree: sum(np.size(x) for x in jax.tree.leaves(tree))  # noqa: E731
    assert size(state) <= 2 * size(params['lora']) + 4

    @jax.jit
    def step(params, state):
        value = lambda p: adapted.task.loss(p, {}, BATCH, jax.random.key(0), True)[0]  # noqa: E731
        grads = jax.grad(value)(params)
        updates, state = adapted.optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), grads

    after, grads = step(params, state)
    jax.tree.map(np.testing.assert_array_equal, after['base'], params['base'])
    assert not any(x.any() for x in jax.tree.leaves(grads['base']))
    assert all(x.any() for x in jax.tree.leaves(grads['lora']))
    changed = jax.tree.map(lambda x, y: bool((x != y).any()), after['lora'], params['lora'])
    assert all(jax.tree.leaves(changed))


def test_generation_uses_the_adapters(params):
    plain, adapted = experiment(lora=LoRA()).task.decoder, experiment().task.decoder
    tokens_BT, cache = BATCH['tokens'][:, :4], plain.init_cache(2)
    want_BTV, _ = plain.step(merge(params, LORA), tokens_BT, cache)
    logits_BTV, _ = adapted.step(params, tokens_BT, cache)
    np.testing.assert_allclose(logits_BTV, want_BTV, atol=1e-4)


def test_base_adapters_and_moments_have_their_places():
    plan = setup(experiment())
    params, moments = plan.shardings.params, plan.shardings.opt_state
    kernel = params['base']['block_0']['mlp']['up']['kernel']
    assert kernel.spec == PartitionSpec('fsdp', 'tensor')
    adapter = params['lora']['block_0']['mlp']['up'][loras.A]
    assert adapter.spec == PartitionSpec('fsdp', None)
    mu = {sharding.path_string(p): s for p, s in jax.tree_util.tree_leaves_with_path(moments)}
    path = next(p for p in mu if p.endswith(f'mu/lora/block_0/mlp/up/{loras.A}'))
    assert mu[path].spec == adapter.spec


def test_the_base_is_read_and_merged_weights_are_written(params, tmp_path):
    class Weights:
        path = 'somewhere'

        def match(self, abstract):
            assert set(abstract['params']) == set(params['base'])
            return 'matched'

        def load(self, abstract, shardings):
            assert set(abstract['params']) == set(shardings['params']) == set(params['base'])
            return {'params/embedding': abstract['params']['embedding']}

        def save(self, folder, variables, max_bytes):
            return jax.tree.map(np.asarray, variables['params'])

    weights = loras.AdaptedWeights(Weights(), LORA)
    assert weights.path == 'somewhere'
    assert weights.match({'params': params}) == 'matched'
    assert set(weights.load({'params': params}, {'params': params})) == {'params/base/embedding'}
    written = weights.save(tmp_path, {'params': params}, 1)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, written, merge(params, LORA))


@pytest.mark.parametrize(
    ('build', 'message'),
    [
        (lambda: LoRA(rank=-1), '--rank=-1: must not be negative; try --rank=8'),
        (
            lambda: LoRA(alpha=32.0),
            '--alpha=32.0: is of adapters, and --rank=0 is none; try --alpha=16.0',
        ),
        (lambda: LoRA(alpha=0.0), '--alpha=0.0: must be above 0 and finite; try --alpha=16'),
        (
            lambda: LoRA(adapt='('),
            '--adapt=(: must be a regular expression; try --adapt=(attention|mlp)/',
        ),
        (
            lambda: setup(experiment(lora=LoRA(rank=2, adapt='conv'))),
            '--adapt=conv: no dense layer has such a path, as for example '
            "'block_0/attention/query' has; try --adapt=.",
        ),
        (
            lambda: setup(experiment(ema=0.9)),
            '--ema: adapters (--rank) have no average; try --ema=0',
        ),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(UsageError) as error:
        build()
    assert str(error.value) == message
