"""The train state, and where each part of it will live."""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bigjax import deterministic, offload, sharding
from bigjax.data.pipeline import train_batches
from bigjax.experiment import Experiment
from bigjax.nn import context
from bigjax.nn.pipeline import stages
from bigjax.task import Task

# A CPU draws so few numbers within a second by a program that was not optimized, which compiles
# several times as fast.
FEW_PARAMETERS = 10_000_000


class TrainState(NamedTuple):
    """What a step reads and writes, and a checkpoint holds.

    Attributes:
      step: int32 scalar, steps done.
      params: float32 parameters.
      opt_state: state of the optax chain.
      extra: what the model keeps beside its parameters, such as BatchNorm statistics.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    extra: Any


class Setup(NamedTuple):
    """Where everything will live, known before anything is allocated or compiled.

    Attributes:
      mesh: devices of all processes.
      abstract: train state of shapes and dtypes.
      shardings: train state of shardings.
    """

    mesh: jax.sharding.Mesh
    abstract: TrainState
    shardings: TrainState

    @property
    def parameters(self) -> int:
        """How many parameters there are."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract.params))


def make_init(task: Task, optimizer: optax.GradientTransformation, seed: int) -> Callable:
    """Returns the pure `(pretrained = {}) -> TrainState` of step 0.

    `pretrained` holds leaves of the task's variables by path, which are not drawn at random.
    """

    def init(pretrained: Mapping[str, jax.Array] = MappingProxyType({})) -> TrainState:
        variables = replaced(dict(task.init(jax.random.key(seed))), pretrained)
        params = variables.pop('params')
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), variables)

    return init


def replaced(tree: Any, leaves: Mapping[str, jax.Array]) -> Any:
    """Returns the tree with the leaves at some paths replaced."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaves.get(sharding.path_string(path), leaf), tree
    )


def variables(state: TrainState) -> dict[str, Any]:
    """Returns what a model is applied with."""
    return {'params': state.params, **state.extra}


def check_pretrained(experiment: Experiment, plan: Setup) -> None:
    """Raises UsageError where the weights that a new run would start from do not fit."""
    if experiment.pretrained and experiment.pretrained.path:
        experiment.pretrained.match(variables(plan.abstract))


def check_pipeline(experiment: Experiment, plan: Setup) -> None:
    """Raises UsageError where a batch does not go through the stages of the mesh, if it has any."""
    with _on(plan.mesh):
        if stages() == 1:
            return
        data, run = experiment.data.train, experiment.run
        row = train_batches(data, batch=1, seed=run.seed, augment=experiment.augment)[0]
        rows = run.batch // run.accumulate
        batch = {k: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for k, x in row.items()}
        state, key = plan.abstract, jax.random.key(0)
        loss = functools.partial(experiment.task.loss, train=True)
        jax.eval_shape(loss, state.params, state.extra, batch, key)


def first_state(experiment: Experiment, plan: Setup) -> TrainState:
    """Returns the state of step 0, born sharded: random, or with pretrained weights.

    Raises:
      UsageError: the pretrained weights do not fit; raised before anything is compiled.
    """
    init = make_init(experiment.task, experiment.optimizer, experiment.run.seed)
    loaded = {}
    if experiment.pretrained and experiment.pretrained.path:
        loaded = experiment.pretrained.load(variables(plan.abstract), variables(plan.shardings))
    # One program makes every leaf, so that several processes own them all alike; the random draws
    # that pretrained weights replace are not in it.
    options: dict[str, Any] = {'out_shardings': plan.shardings, 'donate_argnums': 0}
    if jax.default_backend() == 'cpu' and plan.parameters < FEW_PARAMETERS:
        options['compiler_options'] = {'xla_backend_optimization_level': 0}
    return jax.jit(init, **options)(loaded)


def setup(experiment: Experiment, devices: Sequence[Any] | None = None) -> Setup:
    """Returns mesh, shapes and shardings of a run; allocates and compiles nothing.

    Args:
      experiment: what is to run.
      devices: where, such as on those of a topology; None takes all there are.

    Raises:
      UsageError: mesh, batch, rules, or the metric to monitor do not fit together.
    """
    run = experiment.run
    mesh = sharding.make_mesh(run.mesh, run.dcn, devices)
    sharding.batch_part(mesh)  # Raises where processes would share some rows.
    if run.offload == 'optimizer':
        offload.check(mesh)
    return placed(experiment, mesh)


def _on(mesh: jax.sharding.Mesh) -> AbstractContextManager[Any]:
    """Sets a mesh, which may have no devices."""
    if isinstance(mesh, jax.sharding.AbstractMesh):
        return jax.sharding.use_abstract_mesh(mesh)
    return jax.set_mesh(mesh)


def shapes(experiment: Experiment, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns the state's shapes and types; raises UsageError where the model refuses the mesh."""
    with _on(mesh):
        if context.context_size() > 1 and not experiment.task.splits_positions:
            raise context.refusal()
        return jax.eval_shape(make_init(experiment.task, experiment.optimizer, experiment.run.seed))


def placed(
    experiment: Experiment, mesh: jax.sharding.Mesh, abstract: TrainState | None = None
) -> Setup:
    """Returns what `setup` does for a mesh, whose sizes alone count: one without devices will do.

    Args:
      experiment: what is to run.
      mesh: where.
      abstract: what `shapes` gives, where that is known.

    Raises:
      UsageError: as `setup`, of all that the devices themselves do not tell.
    """
    run = experiment.run
    sharding.check_batch('batch', run.batch, mesh, accumulate=run.accumulate)
    sharding.check_batch('eval_batch', run.eval_batch or run.batch, mesh)
    if run.deterministic:
        deterministic.check(run, mesh)
    if experiment.strategy:
        experiment.strategy.check(mesh.shape)
    if abstract is None:
        abstract = shapes(experiment, mesh)
    shardings = sharding.state_shardings(abstract, experiment.rules, mesh)
    if run.offload == 'optimizer':
        on_host = offload.on_host(shardings.opt_state, abstract.opt_state)
        shardings = shardings._replace(opt_state=on_host)
    return Setup(mesh, abstract, shardings)
