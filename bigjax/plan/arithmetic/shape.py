"""What arithmetic must know of a step: the decoder's shape, and how and where it is computed.

Legend: C width, H query heads, K key-value heads, D size of a head, M hidden width, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from bigjax.nn.moe import DENSE, Routing
from bigjax.plan.topology import Topology
from bigjax.sharding import ACTIVATIONS, AXES, BATCH_AXES, LOGICAL_TO_MESH

FSDP, TENSOR = LOGICAL_TO_MESH['embed'], LOGICAL_TO_MESH['mlp']
EXPERT, STAGE = LOGICAL_TO_MESH['experts'], LOGICAL_TO_MESH['layers']
(CONTEXT,) = ACTIVATIONS['length']
(DATA,) = (axis for axis in BATCH_AXES if axis not in (FSDP, EXPERT))


class Weight(NamedTuple):
    """One parameter, or equal ones.

    Attributes:
      name: what it is.
      sizes: its dimensions.
      axes: their logical axes, as `bigjax.sharding.LOGICAL_TO_MESH` has them.
      layered: whether every layer has one.
      makes: what its product is called in `POLICIES`; '' where it is no matrix of a block.
    """

    name: str
    sizes: tuple[int, ...]
    axes: tuple[str | None, ...]
    layered: bool = True
    makes: str = ''

    @property
    def elements(self) -> int:
        """Of one layer, all experts."""
        return math.prod(self.sizes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder-only transformer.

    Attributes:
      layers: blocks.
      width: C.
      heads: H.
      kv_heads: K.
      head_dim: D.
      hidden: M.
      vocab: V.
      tied: whether the output layer is the embedding.
      gated: whether the MLP has two matrices to its hidden layer (SwiGLU), not one.
      bias: whether dense layers and norms have biases.
      positions: rows of a table of learned positions; 0 where there is none.
      split_vocab: whether the tensor axis splits the vocabulary.
      routing: mixture of experts, if any.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    tied: bool = False
    gated: bool = True
    bias: bool = False
    positions: int = 0
    split_vocab: bool = True
    routing: Routing = DENSE

    def weights(self) -> tuple[Weight, ...]:
        """Returns every parameter."""
        C, D, M, E = self.width, self.head_dim, self.hidden, self.routing.experts
        table = (self.vocab, C), ('vocab' if self.split_vocab else None, 'embed')
        found = [Weight('embedding', *table, layered=False)]
        if not self.tied:
            found += [Weight('output', *table, layered=False)]
        if self.positions:
            found += [Weight('position', (self.positions, C), (None, 'embed'), layered=False)]
        for name, heads in (
            ('query', self.heads),
            ('key', self.kv_heads),
            ('value', self.kv_heads),
        ):
            found += [Weight(name, (C, heads, D), ('embed', 'heads', None), makes='qkv')]
        out = (self.heads, D, C), ('heads', None, 'embed')
        found += [Weight('attention_out', *out, makes='out')]
        lead, which = ((E,), ('experts',)) if E else ((), ())
        for name in ('gate', 'up')[not self.gated :]:
            found += [Weight(name, (*lead, C, M), (*which, 'embed', 'mlp'), makes='mlp_in')]
        found += [Weight('down', (*lead, M, C), (*which, 'mlp', 'embed'), makes='mlp_out')]
        if E:
            found += [Weight('router', (C, E), ('embed', None), makes='router')]
        found += [Weight('norms', (2 * C * (1 + self.bias),), ('embed',))]
        found += [Weight('last_norm', (C * (1 + self.bias),), ('embed',), layered=False)]
        if self.bias:
            projected = (self.heads + 2 * self.kv_heads) * D
            found += [Weight('qkv_bias', (projected,), ('heads',))]
            found += [Weight('hidden_bias', (*lead, M), (*which, 'mlp'))]
            found += [Weight('down_bias', (*lead, C), (*which, 'embed'))]
            found += [Weight('out_bias', (C,), ('embed',))]
        return tuple(found)

    @property
    def parameters(self) -> int:
        """How many there are."""
        return sum(w.elements * (self.layers if w.layered else 1) for w in self.weights())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """How one step of training a decoder is computed, and on what.

    Attributes:
      batch: rows of the step, over all devices.
      length: positions of a row.
      mesh: devices along each mesh axis; absent ones are 1.
      dcn: the part of them that crosses slices, likewise.
      topology: the machine.
      item: bytes of a number of the computation: 2 of bfloat16, 4 of float32.
      saved: what blocks keep for the gradient, some of `PARTS`; None keeps all.
      scan: whether layers are a loop.
      accumulate: microbatches of the optimizer.
      microbatches: parts of a batch in a pipeline; 0 is one a stage.
      context: 'ring' or 'gather'.
      matmul: 'default', 'int8' or 'fp8'.
      attention: 'kernel', which stores no scores and skips what is masked, or the implementation
        'xla' or 'reference' of `pallas_kernels.attention`.
      slots: copies of the parameters that the optimizer keeps.
      offload: whether these wait in the host's memory.
      offloaded: what of `saved`, or 'input', does likewise.
    """

    batch: int
    length: int
    mesh: Mapping[str, int]
    topology: Topology
    dcn: Mapping[str, int] = dataclasses.field(default_factory=dict)
    item: int = 2
    saved: frozenset[str] | None = frozenset()
    scan: bool = True
    accumulate: int = 1
    microbatches: int = 0
    context: str = 'ring'
    matmul: str = 'default'
    attention: str = 'kernel'
    slots: float = 2
    offload: bool = False
    offloaded: frozenset[str] = frozenset()

    def size(self, *axes: str) -> int:
        """Returns the devices along some axes together."""
        return math.prod(self.mesh.get(axis, 1) for axis in axes)

    @property
    def devices(self) -> int:
        """All of them."""
        return self.size(*AXES)

    @property
    def stages(self) -> int:
        """Stages of the pipeline; 1 is none."""
        return self.size(STAGE)

    @property
    def parts(self) -> int:
        """Microbatches of the pipeline."""
        return (self.microbatches or self.stages) if self.stages > 1 else 1

    def rounds(self, layers: int) -> int:
        """Returns how often a microbatch goes round the pipeline, see `bigjax.nn.pipeline`."""
        circular = self.stages > 1 and self.parts % self.stages == 0
        return max(1, layers // self.stages) if circular else 1

    def bubble(self, layers: int) -> float:
        """Returns the steps of a pipeline, idle ones too, over those that compute what counts."""
        turns = self.parts * self.rounds(layers)
        return (turns + self.stages - 1) / turns

    @property
    def tokens(self) -> float:
        """That one device computes at a time, in one microbatch of the optimizer."""
        rows = self.batch / self.size(*BATCH_AXES) / self.accumulate
        return rows * self.length / self.size(CONTEXT)

    def shards(self, axes: tuple[str | None, ...]) -> int:
        """Returns into how many parts a parameter with these logical axes is cut."""
        return self.size(*(LOGICAL_TO_MESH[axis] for axis in axes if axis))


# What a block makes on its way: projections, attention, its projection, a router's choice, and the
# MLP's two layers.
PARTS = ('qkv', 'context', 'out', 'router', 'mlp_in', 'mlp_out')
_SAVED: dict[str, tuple[str, ...]] = {
    'full': (),
    'save_attention': ('context',),
    'save_qkv': ('context', 'qkv'),
    'save_out': ('context', 'qkv', 'out'),
    'minimal': ('context', 'qkv', 'out', 'mlp_in'),
    'dots': ('qkv', 'out', 'router', 'mlp_in', 'mlp_out'),
    'dots_no_batch': ('qkv', 'out', 'router', 'mlp_in', 'mlp_out'),
}


def policy(remat: str, *, experts: bool = False) -> tuple[frozenset[str] | None, frozenset[str]]:
    """Returns what a policy of `bigjax.nn.remat` keeps, and what of that on the host.

    None keeps all. Attention's results are no products to 'dots'; experts are one product with a
    batch dimension.
    """
    if remat == 'none':
        return None, frozenset()
    if remat == 'offload_inputs':
        return frozenset(), frozenset({'input'})
    away = remat.startswith('offload_')
    saved = frozenset(_SAVED[remat.replace('offload_qkv', 'save_qkv').removeprefix('offload_')])
    if remat == 'dots_no_batch' and experts:
        saved -= {'mlp_in', 'mlp_out'}
    return saved, saved if away else frozenset()


def parameter_bytes(shape: Shape, step: Step, item: int = 4) -> int:
    """Returns what one device holds of the parameters."""
    total = 0
    for weight in shape.weights():
        layers = shape.layers // step.stages if weight.layered else 1
        total += weight.elements * layers * item // step.shards(weight.axes)
    return total


def shape_of(model: Any) -> Shape:
    """Returns the shape of a `bigjax.models.decoder.DecoderLM`."""
    gated = hasattr(model, 'hidden')
    head_dim = getattr(model, 'head_dim', 0) or model.width // model.heads
    return Shape(
        layers=model.depth,
        width=model.width,
        heads=model.heads,
        kv_heads=getattr(model, 'kv_heads', model.heads),
        head_dim=head_dim,
        hidden=model.hidden if gated else 4 * model.width,
        vocab=model.vocab_size,
        tied=getattr(model, 'tied', True),
        gated=gated,
        bias=getattr(model, 'bias', False),
        positions=0 if gated else model.context_length,
        split_vocab=gated,  # GPT's 50,257 tokens are no multiple of anything.
        routing=model.routing,
    )
