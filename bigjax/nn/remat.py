"""What the forward pass of a block keeps for its gradient: policies by name.

A block's input is kept always, C b bytes a token with a width of C numbers of b bytes. What a
policy keeps besides goes by the names that the tensors carry: the output of a `Dense` has the name
of its module, attention's two results have `ATTENTION`. In order of memory, with H query and K
key-value heads of size D, and M numbers in the hidden layer (twice those of one product, where a
gate stands beside it), a block keeps for each token:

  full            nothing: C b in all; every product of the block is computed again
  save_attention  attention's output and log-sum-exp, H D b + 4 H: its kernel runs once
  save_qkv        queries, keys and values besides, (H + 2 K) D b: attention is not repeated at all
  save_out        what attention adds to the residual stream besides, C b: only the MLP is repeated
  minimal         the hidden layer besides, M b: no product is repeated, only what lies between them
  none            all that a gradient needs

and, less plainly:

  offload_inputs  as full, the block's input in the host's memory: nothing stays on the device
  offload_qkv     as save_qkv, what it names in the host's memory
  offload_minimal as minimal, what it names in the host's memory
  dots_no_batch   the results of `Dense`, as minimal, but nothing of attention: no product that has
                  a batch dimension
  dots            those of experts, too: of all matrix products outside of attention

XLA's attention keeps the weights of all pairs only under 'none', and takes the scores again under
any other policy. Recomputation: Chen et al. 2016, arXiv:1604.06174; why attention's comes first:
Korthikanti et al. 2022, arXiv:2205.05198, §5.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from bigjax.strategy import Remat
from pallas_kernels.attention import RESIDUALS as ATTENTION

INPUT = 'block_input'
QKV = ('query', 'key', 'value', 'qkv', 'q', 'kv')
OUT = ('out',)
HIDDEN = ('gate', 'up')

_SAVED = {
    'full': (),
    'save_attention': ATTENTION,
    'save_qkv': (*ATTENTION, *QKV),
    'save_out': (*ATTENTION, *QKV, *OUT),
    'minimal': (*ATTENTION, *QKV, *OUT, *HIDDEN),
}
_OFFLOADED = {
    'offload_inputs': (INPUT,),
    'offload_qkv': _SAVED['save_qkv'],
    'offload_minimal': _SAVED['minimal'],
}
# Operations that move or round numbers, and compute none.
_MOVES = {
    'broadcast_in_dim', 'concatenate', 'convert_element_type', 'dynamic_slice', 'gather', 'reshape',
    'slice', 'squeeze', 'transpose',
}  # fmt: skip

Policy = Callable[..., Any]


def policy(remat: Remat, *, stages: bool = False) -> Policy | None:
    """Returns the policy of `jax.checkpoint` that a name stands for; None keeps all there is.

    Args:
      remat: the name.
      stages: whether a `jax.vmap` over the stages of a pipeline runs the block, which then also
        takes its parameters out of an array of several layers: these are never kept once more.
    """
    if remat in _SAVED:
        return jax.checkpoint_policies.save_only_these_names(*_SAVED[remat])
    if remat in _OFFLOADED:
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=_OFFLOADED[remat],
            offload_src='device',
            offload_dst='pinned_host',
        )
    if remat == 'dots':
        return jax.checkpoint_policies.dots_saveable
    if remat == 'dots_no_batch':
        return _dots(batch_dims=int(stages))
    return _all_but_moves if stages else None


def name_input(x: Any) -> Any:
    """Returns a block's input, arrays, under the name that policies have for it."""
    return jax.tree.map(lambda x: checkpoint_name(x, INPUT), x)


def _dots(*, batch_dims: int) -> Policy:
    def saved(primitive: Any, *_: Any, **params: Any) -> bool:
        if primitive.name != 'dot_general':
            return False
        return len(params['dimension_numbers'][1][0]) <= batch_dims

    return saved


def _all_but_moves(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name not in _MOVES
