"""Mixture of experts: every token goes to the few experts that a router picks for it.

On a mesh that splits experts, tokens travel to the devices of theirs and back, by one all-to-all
each way (GShard, Lepikhin et al. 2020). Which goes where does not depend on the mesh.

Legend: B rows, T tokens of a row, C width, E experts, K experts of a token, P = T * K places asked
for, S slots of an expert.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigjax.nn.constrain import both_ways, constrain
from bigjax.nn.context import context_size, sequence_order
from bigjax.run import UsageError, need


@dataclasses.dataclass(frozen=True)
class Routing:
    """Mixture of experts in place of each block's MLP.

    Attributes:
      experts: experts of each block; 0 is one dense MLP
      experts_per_token: experts that each token goes to
      capacity_factor: places of all experts, as a multiple of those asked for; more are dropped
      load_balance: weight of the load-balance loss
      router_z: weight of the router's z-loss
    """

    experts: int = 0
    experts_per_token: int = 2
    capacity_factor: float = 1.25
    load_balance: float = 0.01
    router_z: float = 0.001

    def __post_init__(self) -> None:
        most = max(self.experts, 1)
        for name, rule, ok, good in (
            ('experts', 'must not be negative', self.experts >= 0, 8),
            (
                'experts_per_token',
                f'must be at least 1 and at most --experts={self.experts}',
                1 <= self.experts_per_token <= (self.experts or self.experts_per_token),
                min(2, most),
            ),
            ('capacity_factor', 'must be above 0', self.capacity_factor > 0, 1.25),
            ('load_balance', 'must not be negative', self.load_balance >= 0, 0.01),
            ('router_z', 'must not be negative', self.router_z >= 0, 0.001),
        ):
            if not ok:
                raise UsageError(f'--{name}={getattr(self, name)}: {rule}; try --{name}={good}')
        rule = 'is of a mixture of experts, and --experts=0 is none'
        for field in () if self.experts else dataclasses.fields(self)[1:]:
            given = getattr(self, field.name) != field.default
            need(not given, self, field.name, rule, field.default)

    def capacity(self, tokens: int) -> int:
        """Returns S, the slots that each expert has for one row of so many tokens."""
        places = self.capacity_factor * tokens * self.experts_per_token / self.experts
        return min(tokens, max(1, math.ceil(places)))

    def flops(self, mlp: int, width: int) -> int:
        """Returns the operations of one token, `mlp` being those of one expert: active ones only.

        What the router sends nowhere counts as if it were computed, and empty slots as if not.
        """
        return self.experts_per_token * mlp + 2 * width * self.experts if self.experts else mlp


DENSE = Routing()


class Routes(NamedTuple):
    """Where the tokens of B rows go.

    Attributes:
      source_BES: int32, which token a slot holds; an empty one, any.
      slot_BTK: int32, which of an expert's slots a token has, in its K experts each.
      expert_BTK: int32, the K experts of a token, the most probable first.
      kept_BTK: bool, false where that expert had no slot left.
    """

    source_BES: jax.Array
    slot_BTK: jax.Array
    expert_BTK: jax.Array
    kept_BTK: jax.Array


def route(
    expert_BTK: jax.Array, *, experts: int, slots: int, order_T: np.ndarray | None = None
) -> Routes:
    """Gives every token a slot at each expert it asks for, as far as slots go.

    Rows are routed each by itself, so that a row's result depends on no other row and no device
    needs another's tokens to route its own. Slots go to the tokens in order: none loses its slot
    to a later one, and a causal model stays causal. By sorting, not by one-hot products, whose
    size is that of tokens times slots.

    Args:
      expert_BTK: int32, K different experts for each token.
      experts: E.
      slots: S, slots of an expert in each row.
      order_T: the position that lies at each of the T places, where they are not in order.
    """
    if order_T is not None:
        place_T = np.argsort(order_T)
        routes = route(expert_BTK[:, place_T], experts=experts, slots=slots)
        return routes._replace(
            source_BES=jnp.asarray(place_T, jnp.int32)[routes.source_BES],
            slot_BTK=routes.slot_BTK[:, order_T],
            expert_BTK=expert_BTK,
            kept_BTK=routes.kept_BTK[:, order_T],
        )
    B, T, K = expert_BTK.shape
    expert_BP = expert_BTK.reshape(B, T * K)
    order_BP = jnp.argsort(expert_BP, axis=1, stable=True)
    places_E = jnp.arange(experts)
    count_BE = (expert_BP[:, :, None] == places_E[None, None]).sum(1, dtype=jnp.int32)
    start_BE = jnp.cumsum(count_BE, axis=1) - count_BE
    # How many of the row asked for the same expert before: the place in the sorted order, less
    # the place where that expert's part of it begins.
    rank_BP = jnp.argsort(order_BP, axis=1) - jnp.take_along_axis(start_BE, expert_BP, axis=1)
    slot_BES = start_BE[:, :, None] + jnp.arange(slots)[None, None]
    place_BES = jnp.minimum(slot_BES, T * K - 1).reshape(B, -1)
    source_BES = jnp.take_along_axis(order_BP, place_BES, axis=1).reshape(slot_BES.shape) // K
    slot_BTK = rank_BP.reshape(B, T, K)
    return Routes(source_BES, slot_BTK, expert_BTK, slot_BTK < slots)


class MoE(nn.Module):
    """Experts of one kind, a router over them, and their outputs weighted by it.

    The weight of an expert is its probability, where a token has several divided by their sum
    (Switch, Fedus et al. 2021, eq. 2; GShard, Lepikhin et al. 2020, algorithm 1; Mixtral, Jiang et
    al. 2024, eq. 2). A dropped token gets nothing from that expert; the residual carries it on.
    The router computes in float32.

    In training two losses, times their weights, are sown in the collection 'losses': the balance
    of load, E sum_e f_e p_e with f the share of places asked for and p the mean probability, 1 at
    balance (Switch, eq. 4), and the mean square of the router's log-partition (ST-MoE, Zoph et al.
    2022, eq. 5). Sums and weights of both and of the share 'dropped' are sown in 'metrics'.

    Input and output [B, T, C].

    Attributes:
      make_expert: called with `name`, makes a module from [tokens, slots, C] to the same shape.
      routing: how many experts, of which a token has how many, and the weights of the losses.
    """

    make_expert: Callable[..., nn.Module]
    routing: Routing

    @nn.compact
    def __call__(self, x_BTC: jax.Array, *, drop: bool = True, train: bool = False) -> jax.Array:
        """Returns the weighted outputs of the experts; with `drop` false every token has a slot."""
        routing, (_, T, C) = self.routing, x_BTC.shape
        router_CE = self.param(
            'router_kernel', nn.initializers.normal(0.02), (C, routing.experts), jnp.float32
        )
        logits_BTE = jnp.einsum('btc,ce->bte', x_BTC.astype(jnp.float32), router_CE)
        probability_BTE = jax.nn.softmax(logits_BTE, axis=-1)
        # Not top_k, which XLA's CPU backend does not split over a mesh.
        order_BTE = jnp.argsort(probability_BTE, axis=-1, descending=True)
        expert_BTK = order_BTE[..., : routing.experts_per_token]
        weight_BTK = jnp.take_along_axis(probability_BTE, expert_BTK, axis=-1)
        if routing.experts_per_token > 1:
            weight_BTK /= weight_BTK.sum(-1, keepdims=True)
        slots = routing.capacity(T) if drop else T
        # Every device of a row has the whole row's choices: small numbers.
        routes = route(
            constrain(expert_BTK, 'batch', None, None),
            experts=routing.experts,
            slots=slots,
            order_T=sequence_order(T) if drop else None,
        )
        if train:
            self._sow(routes, logits_BTE, probability_BTE)

        in_BESC = _exchange(_dispatched(x_BTC, routes), sent=True)
        each = nn.vmap(
            lambda expert, x_BSC: expert(x_BSC),
            variable_axes={True: 0},
            split_rngs={True: True},
            in_axes=1,
            out_axes=1,
            axis_size=routing.experts,
        )
        out_BESC = _exchange(each(self.make_expert(name='experts'), in_BESC), sent=False)
        weight_BTK = jnp.where(routes.kept_BTK, weight_BTK, 0).astype(x_BTC.dtype)
        # Placed as their sum is, before it goes elsewhere: else all K outputs of a token would.
        weight_BTK = constrain(weight_BTK, 'batch', 'length', None)
        return _weighted(_fetched(out_BESC, routes, slots), weight_BTK)

    def _sow(self, routes: Routes, logits_BTE: jax.Array, probability_BTE: jax.Array) -> None:
        experts, (B, T, K) = self.routing.experts, routes.expert_BTK.shape
        asked_E = jnp.bincount(routes.expert_BTK.reshape(-1), length=experts)
        share_E = asked_E.astype(jnp.float32) / (B * T * K)
        balance = experts * jnp.sum(share_E * probability_BTE.mean((0, 1)))
        z = jnp.mean(jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1)))
        losses = {
            'load_balance': self.routing.load_balance * balance,
            'router_z': self.routing.router_z * z,
        }
        dropped, one = jnp.sum(~routes.kept_BTK, dtype=jnp.float32), jnp.ones(())
        metrics = {
            'load_balance': (balance, one),
            'router_z': (z, one),
            'dropped': (dropped, jnp.float32(B * T * K)),
        }
        collections: dict[str, dict[str, Any]] = {'losses': losses, 'metrics': metrics}
        for collection, values in collections.items():
            for name, value in values.items():
                self.sow(collection, name, value)


def _dispatched(x_BTC: jax.Array, routes: Routes) -> jax.Array:
    """Returns the tokens in the slots of all experts [B, E, S, C].

    What an empty slot holds is read by its expert and by nobody after it, so it has no gradient.
    Devices that share positions share slots, of which empty ones are added until all have as many.
    """
    x_BTC = both_ways(x_BTC, ('batch', None, None), ('batch', 'length', 'width'))
    more = ((0, 0), (0, 0), (0, -routes.source_BES.shape[2] % context_size()))
    source_BES = constrain(jnp.pad(routes.source_BES, more), 'batch', None, 'length')
    return jax.vmap(lambda x_TC, source_ES: x_TC[source_ES])(x_BTC, source_BES)


def _exchange(x_BESC: jax.Array, *, sent: bool) -> jax.Array:
    """Moves slots from the devices of their rows to those of their experts, or back.

    Experts need the whole width of what they read; what they give, and the gradient that they give
    back, are sums over the devices that share an expert's hidden layer. Each takes the sum of its
    part of the width, and no more of it travels.
    """
    ways = ('batch', None, 'length'), ('expert_rows', 'experts', 'length')
    for names in ways if sent else reversed(ways):
        read, given = (*names, None), (*names, 'width')
        x_BESC = both_ways(x_BESC, *((read, given) if sent else (given, read)))
    return x_BESC


def _fetched(out_BESC: jax.Array, routes: Routes, slots: int) -> jax.Array:
    """Returns the outputs of its experts for every token [B, T, K, C]; of a dropped one, any."""
    rows = 'batch', None, None
    out_BESC = both_ways(out_BESC, (*rows, 'width'), (*rows, None))
    expert_BTK = constrain(routes.expert_BTK, 'batch', 'length', None)
    slot_BTK = constrain(jnp.minimum(routes.slot_BTK, slots - 1), 'batch', 'length', None)
    fetch = jax.vmap(lambda out_ESC, expert_TK, slot_TK: out_ESC[expert_TK, slot_TK])
    o_BTKC, tokens = fetch(out_BESC, expert_BTK, slot_BTK), ('batch', 'length', None)
    return both_ways(o_BTKC, (*tokens, 'width'), (*tokens, None))


@jax.custom_vjp
def _weighted(o_BTKC: jax.Array, weight_BTK: jax.Array) -> jax.Array:
    """Returns sums [B, T, C] over K; a device that shares a hidden layer has its part of the width.

    The gradient of the outputs is of the whole width, which `bigjax.nn.constrain.leave` has
    gathered. Left to itself the compiler takes a part of that for both gradients, and gathers it
    anew.
    """
    return _weighted_forward(o_BTKC, weight_BTK)[0]


def _weighted_forward(o_BTKC: jax.Array, weight_BTK: jax.Array):
    y_BTC = jnp.einsum('btkc,btk->btc', o_BTKC, weight_BTK)
    return constrain(y_BTC, 'batch', 'length', 'width'), (o_BTKC, weight_BTK)


def _weighted_backward(residuals: tuple[jax.Array, jax.Array], dy_BTC: jax.Array):
    o_BTKC, weight_BTK = residuals
    dy_BTC = constrain(dy_BTC, 'batch', 'length', None)
    do_BTKC = dy_BTC[:, :, None] * weight_BTK[..., None]
    part_BTC = constrain(dy_BTC, 'batch', 'length', 'width')
    return do_BTKC, jnp.einsum('btkc,btc->btk', o_BTKC, part_BTC)


_weighted.defvjp(_weighted_forward, _weighted_backward)


def sown(variables: dict[str, Any]) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """Returns the sum of the losses sown by all layers, and the sums and weights of each metric.

    Args:
      variables: the collections 'losses' and 'metrics' of a model, or neither.
    """
    loss = sum((jnp.sum(x) for x in jax.tree.leaves(variables.get('losses', {}))), jnp.zeros(()))
    totals: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables.get('metrics', {})):
        # …/name/(how often sown)/(sum or weight)
        name, part = path[-3].key, path[-1].idx
        pair = totals.setdefault(name, [jnp.zeros(()), jnp.zeros(())])
        pair[part] += jnp.sum(leaf)
    return loss, {name: (value, weight) for name, (value, weight) in totals.items()}
