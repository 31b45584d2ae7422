"""A stack of equal blocks: unrolled or scanned, with or without recomputing what they compute.

Legend: L layers.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigjax.nn import remat as policies
from bigjax.nn.pipeline import pipeline, schedule, stages
from bigjax.run import UsageError
from bigjax.strategy import Remat

# What may be sown in a pipeline, and what is made of the values of its microbatches.
_SOWN = {'losses': jnp.mean, 'metrics': jnp.sum}


def stack(
    make_block: Callable[..., nn.Module],
    x: Any,
    *shared: Any,
    depth: int,
    layers: Any = None,
    scan: bool = False,
    remat: Remat = 'none',
    microbatches: int = 0,
    train: bool = False,
    name: str = 'block',
) -> tuple[Any, Any]:
    """Runs `depth` equal blocks one after the other, inside a compact method of their parent.

    A block is called like the body of `jax.lax.scan`, `block(x, layer, *shared, train=train)`, and
    returns the next `x` and an output of its own, or None. Unrolled, the blocks are the parent's
    children `block_0`, `block_1`, …. Scanned, they are compiled once: one child `blocks` holds
    every variable with a leading axis of layers, and every layer has random keys of its own. Given
    the same parameters (see `stack_layers`) both forms give the same numbers. Unrolled is the
    default because XLA's CPU backend is slow inside loops; a deep model on an accelerator compiles
    faster scanned.

    On a mesh with several stages the scanned layers are split over these, and run as a pipeline
    (see `bigjax.nn.pipeline`), where the layers have no outputs; else, as in decoding with a cache,
    one after the other. What they sow in 'losses' is then the mean over microbatches, in 'metrics'
    the sum; nothing else may be sown.

    Args:
      make_block: called with `name`, makes a block: a module class, or a `functools.partial` of it.
      x: what is handed from block to block, arrays of equal shapes and types before and after.
      *shared: what every block sees besides: arrays with the rows of `x` in front, or with one.
      depth: L, number of blocks.
      layers: what layer i alone sees: unrolled, `layers[i]`; scanned, arrays [L, …] are split. None
        shows each None.
      scan: whether to scan.
      remat: what is kept for the gradient, see `bigjax.nn.remat`.
      microbatches: parts that the rows go through a pipeline in; 0 is one a stage. Where they do
        not divide the rows, evaluation takes fewer.
      train: given to the blocks as it is.
      name: of the children; scanned, an 's' is added.

    Returns:
      The last `x`, and the outputs of all layers: unrolled, a tuple; scanned, arrays [L, …].

    Raises:
      UsageError: several stages, and layers that are not scanned or cannot be split over them.
    """
    if stages() > 1 and not scan:
        raise UsageError(
            f'--scan=False: the {stages()} stages of the mesh need layers that are scanned; '
            f'try --scan'
        )
    blocks = make_block(name=f'{name}s') if scan else None
    if blocks and stages() > 1 and not blocks.is_initializing():
        staged = _Staged(blocks, make_block(parent=None), train)
        if not staged.give_outputs(x, layers, *shared):
            return staged(
                x, layers, *shared, depth=depth, remat=remat, microbatches=microbatches
            ), None

    def call(block: nn.Module, x: Any, layer: Any, *shared: Any) -> tuple[Any, Any]:
        return block(policies.name_input(x), layer, *shared, train=train)

    if remat != 'none':
        # A loop's body is compiled by itself, where nothing can undo the recomputation.
        call = nn.remat(call, policy=policies.policy(remat), prevent_cse=not scan)
    if blocks:
        call = nn.scan(
            call,
            variable_axes={True: 0},
            split_rngs={True: True},
            in_axes=(0, *(nn.broadcast for _ in shared)),
            length=depth,
        )
        return call(blocks, x, layers, *shared)
    outputs = []
    for i in range(depth):
        layer = None if layers is None else layers[i]
        x, output = call(make_block(name=f'{name}_{i}'), x, layer, *shared)
        outputs.append(output)
    return x, tuple(outputs)


class _Staged(NamedTuple):
    """Scanned blocks, of which every stage of the mesh computes its own.

    Attributes:
      blocks: their module, where the variables of all layers and the random keys are.
      block: the same module by itself.
      train: given to it.
    """

    blocks: nn.Module
    block: nn.Module
    train: bool

    def __call__(
        self, x: Any, layers: Any, *shared: Any, depth: int, remat: Remat, microbatches: int
    ) -> Any:
        """Returns the last `x`."""
        rows = jax.tree.leaves(x)[0].shape[0]
        x, (_, made) = pipeline(
            functools.partial(self._layer, self._keys()),
            (self.blocks.variables, layers),
            x,
            *shared,
            schedule=schedule(depth, rows, microbatches, exact=self.train),
            policy=policies.policy(remat, stages=True),
        )
        for collection, values in made.items():
            total = functools.partial(_SOWN[collection], axis=1)
            for name, value in values.items():
                self.blocks.put_variable(collection, name, jax.tree.map(total, value))
        return x

    def give_outputs(self, x: Any, layers: Any, *shared: Any) -> bool:
        """Returns whether the blocks have outputs of their own."""

        def output(own: Any, x: Any, *shared: Any) -> Any:
            own = jax.tree.map(lambda x: x[0], own)
            return self._layer(self._keys(), own, 0, 0, x, *shared)[1][0]

        return bool(
            jax.tree.leaves(jax.eval_shape(output, (self.blocks.variables, layers), x, *shared))
        )

    def _keys(self) -> dict[str, jax.Array]:
        assert self.blocks.scope is not None
        return {name: self.blocks.make_rng(name) for name in self.blocks.scope.rngs}

    def _layer(
        self, keys: dict[str, jax.Array], own: Any, i: Any, m: Any, x: Any, *shared: Any
    ) -> tuple[Any, Any]:
        """Calls the block with what layer i has, for microbatch m."""
        fold = jax.random.fold_in
        (variables, layer), x = own, policies.name_input(x)
        (x, output), made = self.block.apply(
            variables,
            x,
            layer,
            *shared,
            train=self.train,
            rngs={name: fold(fold(key, i), m) for name, key in keys.items()},
            mutable=[name for name in _SOWN if self.blocks.is_mutable_collection(name)],
        )
        return x, (output, made)


def stacked_rules(rules: Sequence[tuple[str, Any]]) -> tuple[tuple[str, Any], ...]:
    """Returns sharding rules that cover a model's parameters in both forms of `stack`.

    What lies below a child named `…blocks` has the axes of the same parameter of one block after
    the axis of layers, which stages split.

    Args:
      rules: ordered (regex without '^', logical axis per dimension or 'largest') for single blocks.
    """
    below = [
        (f'blocks(?=/).*(?:{pattern})', axes if isinstance(axes, str) else ('layers', *axes))
        for pattern, axes in rules
    ]
    return (*below, *rules)


def stack_layers(variables: dict[str, Any], name: str = 'block') -> dict[str, Any]:
    """Returns variables of an unrolled model as the scanned one has them, at every depth.

    The children `block_0` to `block_{L-1}` of any dict become its `blocks`.
    """
    pattern = re.compile(rf'(\w*{name})_(\d+)')
    single: dict[str, Any] = {}
    groups: dict[str, dict[int, Any]] = {}
    for key, value in variables.items():
        if match := pattern.fullmatch(key):
            groups.setdefault(match[1], {})[int(match[2])] = value
        else:
            single[key] = stack_layers(value, name) if isinstance(value, dict) else value
    for stem, blocks in groups.items():
        ordered = (blocks[i] for i in range(len(blocks)))
        single[f'{stem}s'] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ordered)
    return single


def unstack_layers(variables: dict[str, Any], name: str = 'block') -> dict[str, Any]:
    """Returns variables of a scanned model as the unrolled one has them: undoes `stack_layers`."""
    result: dict[str, Any] = {}
    for key, value in variables.items():
        if isinstance(value, dict) and re.fullmatch(rf'\w*{name}s', key):
            depth = jax.tree.leaves(value)[0].shape[0]
            for i in range(depth):
                result[f'{key[:-1]}_{i}'] = jax.tree.map(lambda x, i=i: x[i], value)
        else:
            result[key] = unstack_layers(value, name) if isinstance(value, dict) else value
    return result
