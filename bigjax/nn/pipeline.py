"""A pipeline: every stage of the mesh computes its own layers, for one microbatch after another.

All stages are one program. Their states lie side by side in an array [S, N, …] that is split over
the stages; a step computes a visit of every stage, by `jax.vmap`, and then hands each state to the
next stage: a collective-permute of one microbatch's activations, and nothing else.

Two schedules, one formula. Stage s at step t is on turn t - s; a turn is a microbatch in a round:

  GPipe, R = 1 (Huang et al. 2019, arXiv:1811.06965): a stage holds L / S layers in a row and a
    microbatch visits it once. M + S - 1 steps of L / S layers, of which a share of
    (S - 1) / (M + S - 1) is idle. The parameters are where the mesh has them.
  Circular, R = L / S (as Narayanan et al. 2021, arXiv:2104.04473, §2.2): layer l is on stage l % S
    and a microbatch goes round R times; S of them travel together, and the next S follow on their
    heels. M R + S - 1 steps of one layer, idle for (S - 1) / (M R + S - 1). The layers change
    their devices once per pass over the batch, and the gradients once: each device sends
    its parameters to the others, which is little beside a batch of many thousand tokens.

In both a stage keeps the inputs of L / S layers for each of M microbatches, as without a pipeline
on as many devices, and those of the idle visits; besides, once, the batch's activations, and where
the schedule is circular a second copy of its layers' parameters and of their gradients.

Legend: L layers, S stages, R rounds, K = L / (S R) layers of a visit, B rows, M microbatches,
N = B / M rows of each, Q = ceil(R / S) layers that one stage gives to another.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigjax.mesh import mesh_text
from bigjax.run import UsageError
from bigjax.sharding import ACTIVATIONS, activation_spec

_AXIS = ACTIVATIONS['stages'][0]


class Schedule(NamedTuple):
    """Who computes what: see the legend.

    Attributes:
      stages: S.
      rounds: R.
      layers: K.
      microbatches: M, a multiple of S where R is larger than 1.
    """

    stages: int
    rounds: int
    layers: int
    microbatches: int

    @property
    def steps(self) -> int:
        """Steps until the last microbatch has left the last stage."""
        return self.microbatches * self.rounds + self.stages - 1

    def turn(self, turn: Any) -> tuple[Any, Any]:
        """Returns round and microbatch of a stage's turn; those of an idle one are in range too."""
        wave, within = turn // (self.stages * self.rounds), turn // self.stages
        return within % self.rounds, (wave * self.stages + turn % self.stages) % self.microbatches

    def visits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns step [L, M], stage [L, 1] and place in a visit [L, 1] of layers' microbatches."""
        S, R, K, M = self
        l_L1, m_1M = np.arange(S * R * K)[:, None], np.arange(M)[None]
        s_L1, r_L1 = l_L1 // K % S, l_L1 // (K * S)
        return m_1M // S * (S * R) + r_L1 * S + m_1M % S + s_L1, s_L1, l_L1 % K


def stages() -> int:
    """Returns S of the mesh that is set, 1 without one."""
    return jax.sharding.get_abstract_mesh().shape.get(_AXIS, 1)


def schedule(depth: int, rows: int, microbatches: int, *, exact: bool) -> Schedule:
    """Returns the schedule of a batch on the mesh that is set: circular wherever that goes.

    Args:
      depth: L.
      rows: B.
      microbatches: M; 0 is one a stage.
      exact: whether M must be as asked, or may be less where it does not divide the batch.

    Raises:
      UsageError: the stages do not divide the layers, or the microbatches not the rows of a device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    S = mesh.shape[_AXIS]
    if depth % S:
        raise UsageError(
            f'--mesh={mesh_text(mesh.shape)}: {_AXIS}={S} must divide the {depth} layers; '
            f'try --mesh={mesh_text({**mesh.shape, _AXIS: math.gcd(depth, S), "data": -1})}'
        )
    shards = math.prod(mesh.shape.get(axis, 1) for axis in ACTIVATIONS['batch'])
    own = rows // shards if rows % shards == 0 else 1
    M = microbatches or S
    if own % M:
        good = max(m for m in range(1, min(M, own) + 1) if own % m == 0)
        if exact:
            meaning = f', one for each of the {S} stages' if not microbatches else ''
            raise UsageError(
                f'--microbatches={microbatches}{meaning}: must divide the {own} rows of a batch '
                f'that a device computes; try --microbatches={good}'
            )
        M = good
    R = depth // S if M % S == 0 else 1
    return Schedule(S, R, depth // (S * R), M)


def pipeline(
    layer: Callable[..., tuple[Any, Any]],
    own: Any,
    x: Any,
    *shared: Any,
    schedule: Schedule,
    policy: Callable[..., Any] | None = None,
) -> tuple[Any, Any]:
    """Runs `x` through all layers.

    Args:
      layer: `(own, l, m, x, *shared) -> (x, made)`: with what layer l alone has, its number, that
        of the microbatch (int32 scalars), and its rows. Called under `jax.vmap`.
      own: arrays [L, …], split over the stages along L.
      x: arrays [B, …].
      *shared: arrays [B, …], whose rows go with those of `x`, or [1, …], which all rows see.
      schedule: who computes what.
      policy: of `jax.checkpoint`, what is kept of a layer for the gradient beside its `x`.

    Returns:
      The last `x`, and what the layers made, arrays [L, M, …].
    """
    S, _, K, M = schedule
    held = jax.tree.leaves(x)[0].shape[0]
    own = jax.tree.map(lambda x: _deal(x, schedule), own)
    # Every stage has a place for the whole batch: the first takes from its own what comes in, the
    # last puts into its own what goes out, and none waits for another's.
    batch = jax.tree.map(lambda x: _spread(_cut(x, M), S), x)
    shared = jax.tree.map(
        lambda x: _spread(_cut(x, M) if x.shape[0] == held else x[None], S), shared
    )

    def one(own: Any, shared: Any, x: Any, stage: Any, r: Any, m: Any, k: Any) -> tuple[Any, Any]:
        # A layer's parameters are taken out in here, so that a loop keeps no copies of them.
        own = jax.tree.map(lambda x: _pick(x, r * K + k), own)
        shared = jax.tree.map(lambda x: _pick(x, m if x.shape[0] == M else 0), shared)
        return layer(own, (r * S + stage) * K + k, m, x, *shared)

    one = jax.checkpoint(one, policy=policy, prevent_cse=False)

    def visit(own: Any, shared: Any, stage: Any, t: Any, x: Any) -> tuple[Any, Any]:
        r, m = schedule.turn(t - stage)
        return jax.lax.scan(lambda x, k: one(own, shared, x, stage, r, m, k), x, jnp.arange(K))

    def step(carry: tuple[Any, Any], t: jax.Array) -> tuple[tuple[Any, Any], Any]:
        state, batch = carry
        visits = jax.vmap(visit, (0, 0, 0, None, 0), spmd_axis_name=_AXIS)
        state, made = visits(own, shared, jnp.arange(S), t, state)
        return _hand_on(state, batch, t, schedule), made

    first = jax.tree.map(lambda x: x[:, 0], batch)
    (_, batch), made = jax.lax.scan(step, (first, batch), jnp.arange(schedule.steps))
    made = jax.tree.map(lambda x: x[schedule.visits()], made)
    return jax.tree.map(lambda x: _joined(_last(x, S)), batch), made


def _hand_on(state: Any, batch: Any, t: jax.Array, schedule: Schedule) -> tuple[Any, Any]:
    """Returns the states [S, N, …] of step t + 1, and the batch [S, M, N, …] with those of t."""
    S = schedule.stages
    # What an idle last stage has goes where the first has long taken from, and is overwritten.
    _, done = schedule.turn(jnp.maximum(t - (S - 1), 0))
    r, m = schedule.turn(t + 1)
    enters_S = (jnp.arange(S) == 0) & (r == 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # Else a mask of every step is kept.
    def moved(x: jax.Array, batch: jax.Array, enters_S: jax.Array, m: jax.Array) -> jax.Array:
        enters = enters_S.reshape(S, *(1,) * (x.ndim - 1))
        return _place(jnp.where(enters, _pick(batch, m, 1), _next(x)), 'stages', 'batch')

    def put(batch: jax.Array, x: jax.Array) -> jax.Array:
        batch = jax.lax.dynamic_update_index_in_dim(batch, x, done, 1)
        return _place(batch, 'stages', None, 'batch')

    state = jax.tree.map(lambda x: _place(x, 'stages', 'batch'), state)
    batch = jax.tree.map(put, batch, state)
    return jax.tree.map(lambda x, batch: moved(x, batch, enters_S, m), state, batch), batch


@jax.custom_vjp
def _next(x: jax.Array) -> jax.Array:
    """Returns at s what is at s - 1; the transpose that JAX finds would take two permutes."""
    return jnp.roll(x, 1, 0)


_next.defvjp(lambda x: (_next(x), None), lambda _, g: (jnp.roll(g, -1, 0),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _last(x: jax.Array, stages: int) -> jax.Array:
    """Returns what the last stage has; the transpose that JAX finds sends all of it once more."""
    return x[stages - 1]


def _last_back(stages: int, _: None, g: jax.Array) -> tuple[jax.Array]:
    here_S = (jnp.arange(stages) == stages - 1).reshape(stages, *(1,) * g.ndim)
    return (_place(jnp.where(here_S, g[None], jnp.zeros_like(g)), 'stages', None, 'batch'),)


_last.defvjp(lambda x, stages: (_last(x, stages), None), _last_back)


def _deal(x: jax.Array, schedule: Schedule) -> jax.Array:
    """Returns [S, R K, …]: of [L, …], what each stage computes, in the order of its rounds."""
    S, R, K, _ = schedule
    x = _place(x.reshape(S, R, K, *x.shape[1:]), 'stages')
    if R > 1:
        give_SSQ, take_SR = _exchange(S, R)
        x = _place(jax.vmap(lambda x, i: x[i])(x, give_SSQ), 'stages')
        x = _place(x.swapaxes(0, 1), 'stages')
        x = x.reshape(S, -1, *x.shape[3:])
        x = _place(jax.vmap(lambda x, i: x[i])(x, take_SR), 'stages')
    return x.reshape(S, R * K, *x.shape[3:])


def _exchange(S: int, R: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns which of its R groups of layers a stage gives to each, and how they are put in order.

    Stage s has groups s R, s R + 1, … and needs groups s, s + S, …. It gives every stage as many,
    Q, the first again where there are fewer, and takes [S, Q] from them all.
    """
    Q = -(-R // S)
    give, take = np.zeros((S, S, Q), int), np.zeros((S, R), int)
    count = np.zeros((S, S), int)
    for group in range(S * R):
        source, target = group // R, group % S
        q = count[source, target]
        give[source, target, q] = group % R
        take[target, group // S] = source * Q + q
        count[source, target] += 1
    return give, take


def _cut(x: jax.Array, parts: int) -> jax.Array:
    """Returns [M, N, …], rows m, m + M, … as part m: every device has rows of each part."""
    return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)


def _spread(x: jax.Array, stages: int) -> jax.Array:
    """Returns [S, M, N, …]: [M, N, …] at every stage."""
    return _place(jnp.broadcast_to(x[None], (stages, *x.shape)), 'stages', None, 'batch')


def _joined(x: jax.Array) -> jax.Array:
    """Undoes `_cut`."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


def _pick(x: jax.Array, i: Any, axis: int = 0) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, i, axis, keepdims=False)


def _place(x: jax.Array, *names: str | None) -> jax.Array:
    """Like `bigjax.nn.constrain.constrain`, for the first dimensions: others stay as they are."""
    rest = x.ndim - len(names)
    spec = activation_spec((*names, *(None,) * rest), x.shape, jax.sharding.get_abstract_mesh())
    free = (jax.P.UNCONSTRAINED,) * rest
    return jax.lax.with_sharding_constraint(x, jax.P(*spec[: len(names)], *free))
