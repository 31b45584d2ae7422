"""Pipeline: stages compute what layers one after the other compute, and only permutes run per step.

Legend: L layers, B rows, C width, S stages, R rounds, M microbatches.
"""

import contextlib
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import same_model

from bigjax import experiment, sharding
from bigjax.checkpoint import Checkpoints
from bigjax.models import gpt
from bigjax.models.bert import BERT
from bigjax.models.transformer import Transformer
from bigjax.models.vit import ViT
from bigjax.nn import remat as policies
from bigjax.nn.moe import Routing
from bigjax.nn.pipeline import Schedule, pipeline
from bigjax.nn.stack import stack
from bigjax.run import UsageError
from bigjax.state import check_pipeline, first_state, setup

ROWS, WIDTH = 8, 4


def layer(own, i, m, x_BC, scale_BC, shift_1C):
    """A layer that makes something, and is told which it is, and of which microbatch."""
    y_BC = jnp.tanh(x_BC @ own['w'] * scale_BC + shift_1C) + 0.1 * own['b'][None] * i
    return y_BC, {'sum': jnp.sum(y_BC), 'index': i, 'microbatch': m}


def one_after_the_other(own, x_BC, scale_BC, shift_1C, *, parts):
    """What a pipeline must give, microbatch m being rows m, m + M, ….

    Returns:
      The last x [B, C], and what was made, each [L, M].
    """
    cut = lambda x: jnp.stack([x[m::parts] for m in range(parts)])  # noqa: E731
    scale_MNC, m_M = cut(scale_BC), jnp.arange(parts)

    def one(x_MNC, given):
        i, own = given
        call = functools.partial(layer, own, i, shift_1C=shift_1C)
        return jax.vmap(call)(m_M, x_MNC, scale_MNC)

    x_MNC, made = jax.lax.scan(one, cut(x_BC), (jnp.arange(own['b'].shape[0]), own))
    return x_MNC.swapaxes(0, 1).reshape(x_BC.shape), made


def arguments(depth):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (depth, WIDTH, WIDTH), (depth, WIDTH), (ROWS, WIDTH), (ROWS, WIDTH), (1, WIDTH)
    w, b, *rest = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    return {'w': w, 'b': b}, *rest


def on(mesh, run, *given):
    """Calls a compiled function whose first argument is split over the stages."""
    stages = jax.NamedSharding(mesh, jax.P('stage'))
    with jax.set_mesh(mesh):
        own, *rest = given
        compiled = jax.jit(run).lower(jax.device_put(own, stages), *rest).compile()
        return compiled, compiled(jax.device_put(own, stages), *rest)


@pytest.mark.parametrize(
    ('mesh', 'stages', 'rounds', 'layers', 'microbatches'),
    [
        ('stage=2,data=2,tensor=2', 2, 1, 2, 1),
        ('stage=4,data=2', 4, 1, 1, 2),
        ('stage=2,data=4', 2, 2, 1, 2),  # Layers change places by halves,
        ('stage=4,tensor=2', 4, 3, 1, 8),  # or as it comes; in two waves.
        ('stage=2,fsdp=4', 2, 3, 2, 2),
    ],
)
def test_stages_compute_what_layers_one_after_the_other_compute(
    mesh, stages, rounds, layers, microbatches
):
    given = arguments(stages * rounds * layers)
    plan = Schedule(stages, rounds, layers, microbatches)

    def loss(run, own, *rest):
        y_BC, made = run(own, *rest)
        return jnp.sum(jnp.sin(y_BC)) + jnp.sum(made['sum'] ** 2), (y_BC, made)

    def staged(*given):
        run = lambda *given: pipeline(layer, *given, schedule=plan)  # noqa: E731
        return jax.value_and_grad(loss, argnums=(1, 2, 3, 4), has_aux=True)(run, *given)

    def plain(*given):
        run = lambda *given: one_after_the_other(*given, parts=microbatches)  # noqa: E731
        return jax.value_and_grad(loss, argnums=(1, 2, 3, 4), has_aux=True)(run, *given)

    _, found = on(sharding.make_mesh(mesh), staged, *given)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # noqa: E731
    jax.tree.map(close, found, jax.jit(plain)(*given))


def collectives(text):
    """Returns `{kind: count}` in a compiled program's loops, times their trips, and elsewhere."""
    bodies, body = {}, ''
    for line in text.splitlines():
        if line.startswith(('%', 'ENTRY')):
            body = re.match(r'(?:ENTRY )?%([\w.-]+)', line)[1]
        bodies.setdefault(body, []).append(line)

    def count(body, times):
        for line in bodies[body]:
            if kind := re.search(r' (collective-permute|all-[a-z-]+|reduce-scatter)\(', line):
                yield times > 1, kind[1], times
            if called := re.search(r' while\(.*body=%([\w.-]+)', line):
                trips = int(re.search(r'known_trip_count":\{"n":"(\d+)"', line)[1])
                yield from count(called[1], times * trips)
            elif called := re.search(r' call\(.*to_apply=%([\w.-]+)', line):
                yield from count(called[1], times)

    totals = {}, {}
    for in_loop, kind, times in count(re.search(r'^ENTRY %([\w.-]+)', text, re.M)[1], 1):
        total = totals[0 if in_loop else 1]
        total[kind] = total.get(kind, 0) + times
    return totals


def test_a_step_of_a_pipeline_is_one_permute_and_no_other_collective():
    plan = Schedule(stages=4, rounds=1, layers=2, microbatches=8)
    assert plan.steps == 8 + 3
    mesh, given = sharding.make_mesh('stage=4,tensor=2'), arguments(8)

    def run(*given):
        return jnp.sum(pipeline(layer, *given, schedule=plan)[0])

    forward, _ = on(mesh, run, *given)
    in_loops, elsewhere = collectives(forward.as_text())
    assert in_loops == {'collective-permute': 11}
    assert not {'all-gather', 'all-to-all'} & set(elsewhere)  # Weights stay where they are.
    both, _ = on(mesh, jax.grad(run), *given)
    in_loops, elsewhere = collectives(both.as_text())
    assert in_loops == {'collective-permute': 11 + 11}
    assert not {'all-gather', 'all-to-all'} & set(elsewhere)


def test_the_gradient_of_what_leaves_the_last_stage_needs_no_permute():
    """The transpose that JAX finds for taking the last stage's part pads it, by one more."""
    plan = Schedule(stages=4, rounds=1, layers=2, microbatches=8)

    def run(*given):
        return jnp.sum(jnp.sin(pipeline(layer, *given, schedule=plan)[0]))

    mesh, given = sharding.make_mesh('stage=4,tensor=2'), arguments(8)
    compiled = [on(mesh, function, *given)[0] for function in (run, jax.grad(run))]
    forward, both = (collectives(each.as_text())[1]['collective-permute'] for each in compiled)
    assert forward == both == 1


def test_layers_change_places_once_where_the_schedule_is_circular():
    plan = Schedule(stages=4, rounds=2, layers=1, microbatches=8)
    assert plan.steps == 8 * 2 + 3

    def run(own):
        return jnp.sum(pipeline(layer, own, *rest, schedule=plan)[0])

    own, *rest = arguments(8)
    forward, _ = on(sharding.make_mesh('stage=4,tensor=2'), run, own)
    in_loops, elsewhere = collectives(forward.as_text())
    assert in_loops == {'collective-permute': 19}
    assert elsewhere['all-to-all'] == 2  # w and b
    assert 'all-gather' not in elsewhere


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_no_step_keeps_parameters(remat):
    plan = Schedule(stages=2, rounds=2, layers=1, microbatches=4)

    def half(own, i, m, x_BC):
        return (x_BC @ own.astype(jnp.bfloat16)).astype(x_BC.dtype), None

    def residuals(*given):
        policy = policies.policy(remat, stages=True)
        return jax.vjp(lambda *g: pipeline(half, *g, schedule=plan, policy=policy)[0], *given)[1]

    with jax.set_mesh(sharding.make_mesh('stage=2,data=4')):
        found = jax.eval_shape(residuals, jnp.zeros((4, 64, 64)), jnp.zeros((8, 64)))
    sizes = [x.size for x in jax.tree.leaves(found) if x.shape[-2:] == (64, 64)]
    assert sum(sizes) == 4 * 64 * 64


@pytest.mark.parametrize(
    'knobs',
    [
        pytest.param({'mesh': 'stage=2,data=4'}, id='circular'),
        pytest.param({'mesh': 'stage=4,fsdp=2', 'microbatches': 8, 'remat': 'full'}, id='gpipe'),
        pytest.param(
            {'mesh': 'stage=2,fsdp=2,tensor=2', 'microbatches': 4, 'remat': 'minimal'},
            id='with_fsdp_and_tensor',
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {'mesh': 'stage=4,data=2', 'microbatches': 2, 'remat': 'dots_no_batch'},
            id='fewer_microbatches_than_stages',
            marks=pytest.mark.slow,
        ),
    ],
)
def test_losses_are_those_of_one_device(knobs):
    same_model.same_losses(scan=True, depth=4, **knobs)


# ---- Models on a mesh with stages ----

TINY = {'vocab_size': 32, 'context_length': 8, 'depth': 4, 'heads': 2, 'width': 8, 'scan': True}
TOKENS_BT = jax.random.randint(jax.random.key(1), (8, 8), 0, 32)


def apply(model, variables, *given, mesh='', **options):
    """Applies a model, compiled, on a mesh or on none."""
    run = jax.jit(lambda variables, *given: model.apply(variables, *given, **options))
    if not mesh:
        return run(variables, *given)
    with jax.set_mesh(sharding.make_mesh(mesh)):
        return run(variables, *given)


def close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


@pytest.fixture(scope='module')
def decoder():
    model = gpt.GPT(**TINY)
    return model, jax.jit(model.init)(jax.random.key(0), TOKENS_BT)


@pytest.mark.parametrize('rows', [8, 3])
def test_any_batch_is_evaluated(rows, decoder):
    model, variables = decoder
    tokens_BT = TOKENS_BT[:rows]
    found = apply(model, variables, tokens_BT, mesh='stage=2,data=4')
    close(found, apply(model, variables, tokens_BT))


def test_a_cache_is_decoded_with(decoder):
    model, variables = decoder
    cache = model.init_cache(3)
    given = variables, TOKENS_BT[:3, :2], cache
    found = apply(model, *given, mesh='stage=2,data=4', method='decode')
    close(found, apply(model, *given, method='decode'))


def test_experts_have_the_mean_loss_and_the_sums_of_the_microbatches():
    model = gpt.GPT(**TINY, routing=Routing(experts=2, experts_per_token=1))
    variables = {'params': jax.jit(model.init)(jax.random.key(0), TOKENS_BT)['params']}
    options = {'train': True, 'mutable': ['losses', 'metrics']}
    parts = [apply(model, variables, TOKENS_BT[m::2], **options)[1] for m in range(2)]
    _, found = apply(model, variables, TOKENS_BT, mesh='stage=2,data=4', **options)
    close(found['losses'], jax.tree.map(lambda *x: sum(x) / 2, *(x['losses'] for x in parts)))
    close(found['metrics'], jax.tree.map(lambda *x: sum(x), *(x['metrics'] for x in parts)))


def test_padding_goes_with_its_rows():
    model = BERT(32, positions=8, depth=4, heads=2, width=8, hidden=8, scan=True)
    tokens_BT = jnp.where(jnp.arange(8)[None] < 1 + jnp.arange(8)[:, None], TOKENS_BT, -1)
    variables = jax.jit(model.init)(jax.random.key(0), tokens_BT)
    found = apply(model, variables, tokens_BT, mesh='stage=4,data=2')
    real_BT = tokens_BT >= 0
    close(found[real_BT], apply(model, variables, tokens_BT)[real_BT])


def test_layers_see_what_is_their_own():
    model = ViT(2, 'Ti/4', depth=4, heads=2, width=8, drop_path=0.5, scan=True)
    x_BHWK = jax.random.normal(jax.random.key(0), (8, 8, 8, 1))
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), x_BHWK)
    variables = jax.tree.map(lambda x: x + 0.1, variables)  # The head begins with zeros.
    found = apply(model, variables, x_BHWK, mesh='stage=2,data=4', train=False)
    close(found, apply(model, variables, x_BHWK, train=False))


def test_a_source_is_translated():
    model = Transformer(32, depth=2, heads=2, width=8, hidden=8, scan=True)
    variables = jax.jit(model.init)(jax.random.key(0), TOKENS_BT, TOKENS_BT)
    given = variables, TOKENS_BT, TOKENS_BT[::-1]
    close(apply(model, *given, mesh='stage=2,data=4'), apply(model, *given))
    memory = apply(model, variables, TOKENS_BT, mesh='stage=2,data=4', method='start')
    close(memory.kv, apply(model, variables, TOKENS_BT, method='start').kv)


class Drop(nn.Module):
    """Adds the layer's own factor wherever its dropout keeps a one."""

    @nn.compact
    def __call__(self, x_BC, factor, *, train):
        ones_BC = nn.Dropout(0.5, deterministic=not train)(jnp.ones_like(x_BC))
        return x_BC + factor * (ones_BC > 0), None


class Drops(nn.Module):
    """Four layers, whose decisions can be told from the decimal digits of what comes out."""

    @nn.compact
    def __call__(self, x_BC, *, train):
        factor_L = 10.0 ** jnp.arange(4)
        return stack(Drop, x_BC, layers=factor_L, depth=4, scan=True, train=train)[0]


def test_every_layer_and_microbatch_has_a_dropout_of_its_own():
    def kept(seed):
        rngs = {'dropout': jax.random.key(seed)}
        zeros_BC = jnp.zeros((8, 16))
        y_BC = apply(Drops(), {}, zeros_BC, mesh='stage=2,data=4', train=True, rngs=rngs)
        y_BC = np.asarray(y_BC).round().astype(int)
        return [(y_BC[m::2] // 10**i % 10).tobytes() for i in range(4) for m in range(2)]

    assert len({*kept(0), *kept(1)}) == 2 * 4 * 2


def test_a_checkpoint_of_stages_is_restored_on_any_mesh(tmp_path):
    knobs = same_model.TINY | {'depth': 4, 'scan': True}
    first = experiment.load('llama', **knobs, mesh='stage=4,fsdp=2')
    plan = setup(first)
    state = first_state(first, plan)
    kernel = state.params['blocks']['mlp']['up']['kernel']
    assert kernel.sharding.spec == jax.P('stage', 'fsdp', 'tensor')
    with contextlib.closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
        checkpoints.save(1, state, progress={}, badness=None)
        checkpoints.wait()
        other = setup(experiment.load('llama', **knobs, mesh='data=2,stage=2,tensor=2'))
        restored, _ = checkpoints.restore(1, other.abstract, other.shardings)
    assert jax.tree.map(lambda x: x.sharding, restored) == other.shardings
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))


# ---- What is refused ----


@pytest.mark.parametrize(
    ('knobs', 'message'),
    [
        (
            {'microbatches': 3},
            '--microbatches=3: must divide the 4 rows of a batch that a device computes; '
            'try --microbatches=2',
        ),
        (
            {'batch': 20},
            '--microbatches=0, one for each of the 2 stages: must divide the 5 rows of a batch '
            'that a device computes; try --microbatches=1',
        ),
        (
            {'scan': False},
            '--scan=False: the 2 stages of the mesh need layers that are scanned; try --scan',
        ),
        ({'depth': 3}, '--mesh=stage=2,data=4: stage=2 does not divide the 3 layers of parameter'),
    ],
)
def test_what_stages_cannot_do_is_refused_before_anything_is_compiled(knobs, message):
    knobs = same_model.TINY | {'scan': True, 'mesh': 'stage=2,data=4', 'depth': 4} | knobs

    def check():
        made = experiment.load('llama', **knobs)
        check_pipeline(made, setup(made))

    with pytest.raises(UsageError) as error:
        check()
    assert str(error.value).startswith(message)
