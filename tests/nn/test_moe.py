"""Mixture of experts: what is routed is conserved, capacity is respected, nothing looks ahead."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigjax.experiment import UsageError
from bigjax.nn.linear import Dense
from bigjax.nn.moe import MoE, Routing, route, sown

ROUTING = Routing(experts=4, experts_per_token=2, capacity_factor=0.75)
SMALL = settings(max_examples=30, deadline=None)


class Expert(nn.Module):
    """One dense layer."""

    @nn.compact
    def __call__(self, x_BSC):
        return nn.tanh(Dense(x_BSC.shape[-1], name='up')(x_BSC))


def mixture(routing=ROUTING):
    return MoE(Expert, routing)


@pytest.fixture(scope='module')
def x_BTC():
    return jax.random.normal(jax.random.key(1), (2, 8, 4))


@pytest.fixture(scope='module')
def variables(x_BTC):
    variables = mixture().init(jax.random.key(0), x_BTC)
    # A router that prefers clearly, so that some experts overflow.
    router_CE = 100 * variables['params']['router_kernel']
    return {'params': {**variables['params'], 'router_kernel': router_CE}}


@functools.cache
def jitted(slots):
    return jax.jit(functools.partial(route, experts=4, slots=slots))


@SMALL
@given(st.integers(0, 2**31), st.integers(1, 6))
def test_routing_is_conserved(seed, slots):
    draw = np.random.default_rng(seed)
    expert_BTK = np.argsort(draw.random((2, 6, 4)) ** 3, -1)[..., :2].astype(np.int32)
    routes = jax.device_get(jitted(slots)(expert_BTK))
    asked_BE = np.stack([np.bincount(row.reshape(-1), minlength=4) for row in expert_BTK])
    assert routes.kept_BTK.sum() == np.minimum(asked_BE, slots).sum()
    # Every expert fills its slots from the first, each with a token of its own, while they last.
    empty = {
        (b, e, s) for b, e in np.ndindex(*asked_BE.shape) for s in range(min(asked_BE[b, e], slots))
    }
    for b, t, k in zip(*routes.kept_BTK.nonzero(), strict=True):
        place = b, int(expert_BTK[b, t, k]), int(routes.slot_BTK[b, t, k])
        empty.remove(place)
        assert routes.source_BES[place] == t
    assert not empty
    # Where one is dropped, all later tokens are, too: slots went in order.
    for b in range(2):
        for e in range(4):
            kept = routes.kept_BTK[b][expert_BTK[b] == e]
            assert not (kept[1:] & ~kept[:-1]).any()


def by_hand(params, x_BTC, routing, slots):
    """The same, token by token, in numpy."""
    y_BTC = np.zeros_like(x_BTC)
    kernel_ECC, bias_EC = params['experts']['up']['kernel'], params['experts']['up']['bias']
    dropped, places = 0, 0
    for b, x_TC in enumerate(np.asarray(x_BTC)):
        used = [0] * routing.experts
        for t, x_C in enumerate(x_TC):
            probability_E = np.asarray(jax.nn.softmax(x_C @ params['router_kernel']))
            chosen = np.argsort(-probability_E)[: routing.experts_per_token]
            total = probability_E[chosen].sum() if len(chosen) > 1 else 1.0
            for e in chosen:
                places += 1
                if used[e] == slots:
                    dropped += 1
                    continue
                used[e] += 1
                out_C = np.tanh(x_C @ kernel_ECC[e] + bias_EC[e])
                y_BTC[b, t] += probability_E[e] / total * out_C
    return y_BTC, dropped, places


@pytest.mark.parametrize('k', [1, 2])
def test_tokens_get_the_weighted_outputs_of_their_experts(k, variables, x_BTC):
    routing = Routing(experts=4, experts_per_token=k, capacity_factor=0.75)
    model, params = mixture(routing), jax.device_get(variables['params'])
    y_BTC, updated = model.apply(variables, x_BTC, train=True, mutable=['metrics', 'losses'])
    want_BTC, dropped, places = by_hand(params, x_BTC, routing, routing.capacity(8))
    np.testing.assert_allclose(y_BTC, want_BTC, atol=1e-5)
    _, metrics = sown(updated)
    assert 0 < dropped < places
    assert metrics['dropped'] == (dropped, places)
    whole_BTC = model.apply(variables, x_BTC, drop=False)
    np.testing.assert_allclose(whole_BTC, by_hand(params, x_BTC, routing, 8)[0], atol=1e-5)


def test_no_token_sees_a_later_one_nor_another_row(variables, x_BTC):
    run = lambda x_BTC: mixture().apply(variables, x_BTC).sum(-1)  # noqa: E731
    gradient_BTBTC = jax.jit(jax.jacrev(run))(x_BTC)
    seen_BTBT = (gradient_BTBTC != 0).any(-1)
    assert not (seen_BTBT & ~jnp.eye(2, dtype=bool)[:, None, :, None]).any()
    assert not (seen_BTBT & ~jnp.tri(8, dtype=bool)[None, :, None]).any()
    # Nor does a change of the last token take a slot from an earlier one.
    other_BTC = x_BTC.at[:, -1].set(-3.0)
    np.testing.assert_array_equal(run(x_BTC)[:, :-1], run(other_BTC)[:, :-1])


def test_losses_are_those_of_the_papers(variables, x_BTC):
    routing = Routing(experts=4, load_balance=0.5, router_z=0.25)
    _, updated = mixture(routing).apply(variables, x_BTC, train=True, mutable=['metrics', 'losses'])
    logits_BTE = np.float64(x_BTC) @ np.float64(variables['params']['router_kernel'])
    p_BTE = np.exp(logits_BTE) / np.exp(logits_BTE).sum(-1, keepdims=True)
    top = np.argsort(-p_BTE, -1)[..., :2]
    share_E = np.bincount(top.reshape(-1), minlength=4) / top.size
    balance = 4 * (share_E * p_BTE.mean((0, 1))).sum()
    z = (np.log(np.exp(logits_BTE).sum(-1)) ** 2).mean()
    loss, metrics = sown(updated)
    assert loss == pytest.approx(0.5 * balance + 0.25 * z, rel=1e-4)
    assert metrics['load_balance'][0] == pytest.approx(balance, rel=1e-4)
    assert metrics['router_z'] == (pytest.approx(z, rel=1e-4), 1)


def test_balance_is_one_where_all_experts_are_alike(variables, x_BTC):
    params = {**variables['params'], 'router_kernel': jnp.zeros((4, 4))}
    _, updated = mixture().apply({'params': params}, x_BTC, train=True, mutable=['metrics'])
    assert sown(updated)[1]['load_balance'][0] == pytest.approx(1.0)


def test_nothing_is_sown_out_of_training(variables, x_BTC):
    _, updated = mixture().apply(variables, x_BTC, mutable=['losses', 'metrics'])
    loss, metrics = sown(updated)
    assert loss == 0
    assert not metrics


def test_capacity_and_flops():
    routing = Routing(experts=4, experts_per_token=2, capacity_factor=1.25)
    assert routing.capacity(8) == 5 == math.ceil(1.25 * 8 * 2 / 4)
    assert routing.capacity(1) == 1
    assert Routing(experts=2, capacity_factor=9.0).capacity(8) == 8
    assert routing.flops(100, 16) == 2 * 100 + 2 * 16 * 4
    assert Routing().flops(100, 16) == 100


@pytest.mark.parametrize(
    ('knobs', 'message'),
    [
        (
            {'experts': 4, 'experts_per_token': 5},
            '--experts_per_token=5: must be at least 1 and at most --experts=4; '
            'try --experts_per_token=2',
        ),
        ({'capacity_factor': 0.0}, '--capacity_factor=0.0: must be above 0; try '
         '--capacity_factor=1.25'),
        ({'capacity_factor': 2.0}, '--capacity_factor=2.0: is of a mixture of experts, and '
         '--experts=0 is none; try --capacity_factor=1.25'),
        ({'experts': -1}, '--experts=-1: must not be negative; try --experts=8'),
    ],
)  # fmt: skip
def test_knobs_out_of_range_are_refused(knobs, message):
    with pytest.raises(UsageError) as error:
        Routing(**knobs)
    assert str(error.value) == message
