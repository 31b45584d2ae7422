"""A stack of equal blocks: unrolled or scanned, with or without recomputing what they compute.

Legend: L layers.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigjax.strategy import Remat

# What the forward pass keeps for the gradient; 'full' keeps the blocks' inputs alone. Our Dense
# multiplies matrices, so 'dots_no_batch' keeps its outputs but not the scores of attention.
_POLICIES = {
    'full': None,
    'dots': jax.checkpoint_policies.dots_saveable,
    'dots_no_batch': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def stack(
    make_block: Callable[..., nn.Module],
    x: Any,
    *shared: Any,
    depth: int,
    layers: Any = None,
    scan: bool = False,
    remat: Remat = 'none',
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

    Args:
      make_block: called with `name`, makes a block: a module class, or a `functools.partial` of it.
      x: what is handed from block to block, arrays of equal shapes and types before and after.
      *shared: what every block sees besides.
      depth: L, number of blocks.
      layers: what layer i alone sees: unrolled, `layers[i]`; scanned, arrays [L, …] are split. None
        shows each None.
      scan: whether to scan.
      remat: 'none' keeps what a gradient needs; 'full' keeps the inputs of the blocks and computes
        the rest again; 'dots' keeps the results of all matrix products; 'dots_no_batch' of those
        without a batch dimension, the dense layers (Chen et al. 2016, arXiv:1604.06174).
      train: given to the blocks as it is.
      name: of the children; scanned, an 's' is added.

    Returns:
      The last `x`, and the outputs of all layers: unrolled, a tuple; scanned, arrays [L, …].
    """

    def call(block: nn.Module, x: Any, layer: Any, *shared: Any) -> tuple[Any, Any]:
        return block(x, layer, *shared, train=train)

    if remat != 'none':
        # A loop's body is compiled by itself, where nothing can undo the recomputation.
        call = nn.remat(call, policy=_POLICIES[remat], prevent_cse=not scan)
    if scan:
        call = nn.scan(
            call,
            variable_axes={True: 0},
            split_rngs={True: True},
            in_axes=(0, *(nn.broadcast for _ in shared)),
            length=depth,
        )
        return call(make_block(name=f'{name}s'), x, layers, *shared)
    outputs = []
    for i in range(depth):
        layer = None if layers is None else layers[i]
        x, output = call(make_block(name=f'{name}_{i}'), x, layer, *shared)
        outputs.append(output)
    return x, tuple(outputs)


def stacked_rules(rules: Sequence[tuple[str, Any]]) -> tuple[tuple[str, Any], ...]:
    """Returns sharding rules that cover a model's parameters in both forms of `stack`.

    What lies below a child named `…blocks` has the axes of the same parameter of one block after
    an axis of layers, which is never split: every device needs every layer.

    Args:
      rules: ordered (regex without '^', logical axis per dimension or 'largest') for single blocks.
    """
    below = [
        (f'blocks(?=/).*(?:{pattern})', axes if isinstance(axes, str) else (None, *axes))
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
