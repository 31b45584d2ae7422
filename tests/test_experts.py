"""Experts on other devices train the same model; tokens travel to them by all-to-all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import collectives, gradient_text
from same_model import same_losses

from bigjax import sharding
from bigjax.models import gpt, llama
from bigjax.nn.moe import MoE, Routing, route
from bigjax.run import UsageError

# Places for three quarters of what is asked for: some tokens are dropped in every step.
DROPS = {'experts': 4, 'capacity_factor': 0.75}
slow = pytest.mark.slow


@pytest.mark.parametrize(
    'knobs',
    [
        pytest.param(DROPS | {'mesh': 'data=2,expert=2,tensor=2'}, marks=slow),
        DROPS | {'mesh': 'context=2,expert=4'},
        pytest.param(DROPS | {'mesh': 'fsdp=4,expert=2', 'experts_per_token': 1}, marks=slow),
        pytest.param(DROPS | {'mesh': 'data=2,expert=4', 'scan': True}, marks=slow),
        pytest.param(
            DROPS | {'mesh': 'context=2,expert=2,tensor=2', 'context': 'gather'}, marks=slow
        ),
    ],
    ids=lambda knobs: knobs['mesh'],
)
def test_it_trains_the_same_model(knobs):
    same_losses(**knobs)


def test_the_exchange_is_all_to_all():
    found = collectives(gradient_text(mesh='data=2,expert=4', **DROPS))
    # 2 rows a device; of 16 tokens, 2 experts each, 0.75: 6 slots for each of 4 experts; 32
    # channels, float32. There and back, and so the gradients. Nobody gets all tokens.
    assert found.pop(('all-to-all', 2 * 4 * 6 * 32 * 4)) == 4
    assert {kind for kind, _ in found} == {'all-reduce'}


def test_tensor_parallel_experts_exchange_as_little():
    found = collectives(gradient_text(mesh='data=2,expert=2,tensor=2', **DROPS))
    # The router's numbers, of which some are exchanged too, are few.
    exchanged = {size: n for (kind, size), n in found.items() if kind == 'all-to-all'}
    assert exchanged.pop(256, 0) <= 6
    slots, tokens = 4 * 4 * 6 * 32 * 4, 4 * 16 * 32 * 4
    # Experts read slots of the whole width, and so their gradient does. What they give, and give
    # back, travels as the part that a device has summed up; the tokens that it is combined to go
    # from a part of the width to a part of the positions.
    assert exchanged == {slots: 2, slots // 2: 2, tokens // 2: 2}
    # Tokens alone are gathered, one for all experts that it goes to.
    gathered = {size: n for (kind, size), n in found.items() if kind == 'all-gather'}
    assert max(gathered) == tokens


@functools.cache
def routed(ordered):
    order_T = np.random.default_rng(5).permutation(12) if ordered else None
    return order_T, jax.jit(functools.partial(route, experts=4, slots=4, order_T=order_T))


def test_slots_go_by_position_wherever_a_token_lies():
    expert_BTK = np.argsort(np.random.default_rng(0).random((2, 12, 4)) ** 3, -1)[..., :2]
    expert_BTK = expert_BTK.astype(np.int32)
    want = routed(False)[1](expert_BTK)
    order_T, apart = routed(True)
    got = apart(expert_BTK[:, order_T])
    assert not want.kept_BTK.all()
    np.testing.assert_array_equal(got.kept_BTK, want.kept_BTK[:, order_T])
    np.testing.assert_array_equal(got.slot_BTK, want.slot_BTK[:, order_T])
    for b, t, k in zip(*np.asarray(got.kept_BTK).nonzero(), strict=True):
        assert got.source_BES[b, expert_BTK[b, order_T[t], k], got.slot_BTK[b, t, k]] == t


def test_devices_share_slots_that_do_not_divide():
    # Five slots on two devices of a sequence, where none is dropped and no order counts.
    routing = Routing(experts=4, capacity_factor=1.25)
    model = MoE(functools.partial(llama.MLP, 8, jnp.float32), routing)
    x_BTC = jax.random.normal(jax.random.key(1), (4, 8, 4))
    assert routing.capacity(8) == 5
    variables = model.init(jax.random.key(0), x_BTC)
    run = jax.jit(lambda variables, x_BTC: model.apply(variables, x_BTC))
    want = run(variables, x_BTC)
    with jax.set_mesh(sharding.make_mesh('data=2,context=2,expert=2')):
        order_T = np.array([0, 1, 6, 7, 2, 3, 4, 5])
        got = run(variables, x_BTC[:, order_T])
    np.testing.assert_allclose(got, want[:, order_T], atol=1e-6)


@pytest.mark.parametrize('family', [llama, gpt])
def test_experts_are_split_by_expert_and_each_by_tensor(family):
    mesh = sharding.make_mesh('fsdp=2,expert=2,tensor=2')
    where = {
        name: sharding.spec_for(f'block_0/moe/experts/{name}/kernel', (4, 8, 8), family.RULES, mesh)
        for name in ('up', 'down')
    }
    assert where == {
        'up': jax.P('expert', 'fsdp', 'tensor'),
        'down': jax.P('expert', 'tensor', 'fsdp'),
    }


def test_experts_that_do_not_divide_are_refused():
    mesh = sharding.make_mesh('data=2,expert=4')
    with pytest.raises(UsageError) as error:
        sharding.spec_for('block_0/moe/experts/up/kernel', (6, 8, 8), llama.RULES, mesh)
    assert str(error.value) == (
        "--mesh=data=2,expert=4: expert=4 does not divide the 6 experts of parameter 'block_0/moe/"
        "experts/up/kernel'; try --mesh=data=-1,expert=2"
    )
