"""LoRA: fine-tuning of small low-rank adapters beside frozen weights (Hu et al. 2021).

A dense layer x W becomes x W + (alpha / rank) (x A) B with A and B trained: no model is changed
for it, the term is added around the calls of `bigjax.nn.linear.Dense`. Legend: I inputs and O
outputs of a layer, flattened, R rank, N rows.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from bigjax.experiment import Experiment, UsageError
from bigjax.nn.linear import Dense
from bigjax.run import need
from bigjax.task import Task
from bigjax.transforms import AverageState

A, B = 'lora_a_kernel', 'lora_b_kernel'
RULES = ((rf'({A}|{B})$', 'largest'),)


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Fine-tuning of low-rank adapters, all else frozen.

    Attributes:
      rank: rank of the adapters; 0 trains the weights themselves
      alpha: scale of the adapters' part; it is multiplied by alpha / rank
      adapt: regex of the dense layers that get an adapter, by their path
    """

    rank: int = 0
    alpha: float = 16.0
    adapt: str = '(attention|mlp)/'

    def __post_init__(self) -> None:
        for name, rule, ok, good in (
            ('rank', 'must not be negative', self.rank >= 0, 8),
            ('alpha', 'must be above 0 and finite', 0 < self.alpha < math.inf, 16),
            ('adapt', 'must be a regular expression', _compiles(self.adapt), '(attention|mlp)/'),
        ):
            if not ok:
                raise UsageError(f'--{name}={getattr(self, name)}: {rule}; try --{name}={good}')
        for field in () if self.rank else dataclasses.fields(self)[1:]:
            given = getattr(self, field.name) != field.default
            need(not given, self, field.name, 'is of adapters, and --rank=0 is none', field.default)


def with_lora(experiment: Experiment, lora: LoRA) -> Experiment:
    """Returns the experiment with adapters trained instead of its weights; itself at rank 0.

    Its parameters become `{'base': frozen, 'lora': adapters}`. Both are parameters, not the base
    something besides, because all that must see the base sees parameters: sharding rules, text
    generation, weights read and written. Only the optimizer sees the adapters alone, so that
    nothing is kept for the base; its gradient is zero and folds away (but with --accumulate, which
    adds up zeros). What is exported are merged weights.
    """
    if not lora.rank:
        return experiment
    changes: dict[str, Any] = {}
    if experiment.pretrained is not None:
        changes['pretrained'] = AdaptedWeights(experiment.pretrained, lora)
    if experiment.generate is not None:
        changes['generate'] = adapted(experiment.generate, lora)
    return dataclasses.replace(
        experiment,
        task=lora_task(experiment.task, lora),
        optimizer=for_adapters(experiment.optimizer),
        rules=(*RULES, *experiment.rules),
        **changes,
    )


def lora_task(task: Task, lora: LoRA) -> Task:
    """Returns a task on `{'base': …, 'lora': …}` whose gradient reaches the adapters alone."""

    def init(key: jax.Array) -> dict[str, Any]:
        layers: dict[tuple[str, ...], Dense] = {}

        def note(call: Callable, args: Any, kwargs: Any, context: Any) -> Any:
            if isinstance(context.module, Dense):
                layers[context.module.path] = context.module
            return call(*args, **kwargs)

        with nn.intercept_methods(note):
            variables = dict(task.init(key))
        base = variables.pop('params')
        adapters = _new_adapters(jax.random.fold_in(key, 1), base, layers, lora)
        return {'params': {'base': base, 'lora': adapters}, **variables}

    def loss(params, extra, batch, key, train):
        params = {**params, 'base': jax.lax.stop_gradient(params['base'])}
        return adapted(task.loss, lora)(params, extra, batch, key, train)

    changes: dict[str, Any] = {'init': init, 'loss': loss}
    if task.decoder is not None:
        changes['decoder'] = task.decoder._replace(step=adapted(task.decoder.step, lora))
    if task.predict is not None:
        changes['predict'] = adapted(task.predict, lora)
    return task._replace(**changes)


def adapted(function: Callable, lora: LoRA) -> Callable:
    """Returns `function(params, …)` on `{'base': …, 'lora': …}`, whose models use the adapters."""

    def add_low_rank(call: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        y = call(*args, **kwargs)
        layer = context.module
        if not isinstance(layer, Dense) or not layer.has_variable('params', A):
            return y
        a: jax.Array = layer.get_variable('params', A).astype(y.dtype)
        b: jax.Array = layer.get_variable('params', B).astype(y.dtype)
        x_NI = args[0].reshape(-1, math.prod(a.shape[:-1])).astype(y.dtype)
        low_NO = (x_NI @ a.reshape(-1, lora.rank)) @ b.reshape(lora.rank, -1)
        return y + (lora.alpha / lora.rank) * low_NO.reshape(y.shape)

    def call(params: Any, *args: Any) -> Any:
        # A layer finds its adapter beside its kernel, also where layers are scanned.
        with nn.intercept_methods(add_low_rank):
            return function(_joined(params['base'], params['lora']), *args)

    return call


def merge(params: dict[str, Any], lora: LoRA) -> Any:
    """Returns weights without adapters that do the same: W + (alpha / rank) A B (§4.1)."""
    return _shifted(params['base'], params['lora'], lora.alpha / lora.rank)


def unmerge(merged: Any, adapters: Any, lora: LoRA) -> dict[str, Any]:
    """Returns `{'base': …, 'lora': …}` from merged weights and their adapters.

    `unmerge(merge(params))` gives the base up to the rounding of one addition and one subtraction:
    half a unit in the last place of the merged weight, and of the base's.
    """
    return {'base': _shifted(merged, adapters, -lora.alpha / lora.rank), 'lora': adapters}


def for_adapters(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns the optimizer of `{'base': …, 'lora': …}` that updates the adapters alone.

    Raises:
      UsageError: from init, where the optimizer keeps an average of the weights.
    """

    def own(tree: dict[str, Any]) -> dict[str, Any]:
        # Under its name, so that its moments are placed like the adapters.
        return {'lora': tree['lora']}

    def init(params):
        state = optimizer.init(own(params))
        is_average = lambda x: isinstance(x, AverageState)  # noqa: E731
        if any(map(is_average, jax.tree.leaves(state, is_leaf=is_average))):
            raise UsageError('--ema: adapters (--rank) have no average; try --ema=0')
        return state

    def update(grads, state, params):
        updates, state = optimizer.update(own(grads), state, own(params))
        return {'base': jax.tree.map(jnp.zeros_like, params['base']), **updates}, state

    return optax.GradientTransformation(init, update)


@dataclasses.dataclass(frozen=True)
class AdaptedWeights:
    """`bigjax.pretrained` for an experiment with adapters: the base is read, merged is written."""

    inner: Any
    lora: LoRA

    @property
    def path(self) -> str:
        return self.inner.path

    def match(self, abstract: Any) -> Any:
        return self.inner.match(_base(abstract))

    def load(self, abstract: Any, shardings: Any) -> dict[str, jax.Array]:
        loaded = self.inner.load(_base(abstract), _base(shardings))
        return {re.sub('^params/', 'params/base/', path): x for path, x in loaded.items()}

    def save(self, folder: Path, variables: Any, max_bytes: int) -> tuple[int, int]:
        merged = {**variables, 'params': jax.jit(self.merged)(variables['params'])}
        return self.inner.save(folder, merged, max_bytes)

    def merged(self, params: Any) -> Any:
        return merge(params, self.lora)


def _base(variables: dict[str, Any]) -> dict[str, Any]:
    return {**variables, 'params': variables['params']['base']}


def _new_adapters(
    key: jax.Array, base: Any, layers: dict[tuple[str, ...], Dense], lora: LoRA
) -> dict[str, Any]:
    """A is drawn with deviation 1 / sqrt(inputs), B is zero: at first the adapter does nothing."""
    weights, adapters = flatten_dict(base), {}
    for number, (path, layer) in enumerate(layers.items()):
        if not re.search(lora.adapt, '/'.join(path)):
            continue
        shape = weights[*path, 'kernel'].shape
        outputs = 1 if isinstance(layer.features, int) else len(layer.features)
        stacked = shape[: len(shape) - layer.in_dims - outputs]  # layers, experts
        inputs, features = shape[len(stacked) : len(shape) - outputs], shape[len(shape) - outputs :]
        drawn = jax.random.normal(jax.random.fold_in(key, number), (*stacked, *inputs, lora.rank))
        adapters[*path, A] = drawn / math.sqrt(math.prod(inputs))
        adapters[*path, B] = jnp.zeros((*stacked, lora.rank, *features))
    if not adapters:
        known = '/'.join(next(iter(layers), ('', '')))
        raise UsageError(
            f'--adapt={lora.adapt}: no dense layer has such a path, as for example {known!r} has; '
            f'try --adapt=.'
        )
    return unflatten_dict(adapters)


def _shifted(weights: Any, adapters: Any, scale: float) -> Any:
    """Returns the tree of weights with `scale` A B added to the kernels that have adapters."""
    if A not in adapters:
        below = {name: _shifted(weights[name], part, scale) for name, part in adapters.items()}
        return {**weights, **below}
    kernel, a, b = weights['kernel'], adapters[A], adapters[B]
    stacked = kernel.shape[: a.ndim + b.ndim - 2 - kernel.ndim]
    a, b = a.reshape(*stacked, -1, a.shape[-1]), b.reshape(*stacked, a.shape[-1], -1)
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return {**weights, 'kernel': kernel + scale * product.reshape(kernel.shape)}


def _joined(weights: Any, adapters: Any) -> Any:
    """Returns one tree of both, without copying an array."""
    return unflatten_dict({**flatten_dict(weights), **flatten_dict(adapters)})


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
