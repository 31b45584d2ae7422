"""How a decoder is computed, whatever it learns: the knobs that every decoder shares."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from bigjax.mesh import mesh_text
from bigjax.run import need
from bigjax.sharding import ACTIVATIONS

Remat = Literal[
    'none', 'full', 'save_attention', 'save_qkv', 'save_out', 'minimal', 'dots', 'dots_no_batch',
    'offload_inputs', 'offload_qkv', 'offload_minimal',
]  # fmt: skip
Context = Literal['ring', 'gather']
Matmul = Literal['default', 'int8', 'fp8']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strategy:
    """What is looped over, kept for the gradient, cut into parts and rounded.

    Attributes:
      scan: compile one block and loop over the layers; slow on a CPU
      remat: what a block computes again for its gradient, to save memory
      microbatches: parts of a batch in a pipeline, on a mesh with stages; 0 takes one a stage
      context: how positions on other devices are seen, on a mesh with context: ring or gather
      matmul: precision of dense layers: default is the computation's type
    """

    scan: bool = False
    remat: Remat = 'none'
    microbatches: int = 0
    context: Context = 'ring'
    matmul: Matmul = 'default'

    # A resumed run may change these: they say how it is computed on its machine, not what.
    FREE: ClassVar[tuple[str, ...]] = ('remat', 'microbatches', 'context')

    def __post_init__(self) -> None:
        need(self.microbatches >= 0, self, 'microbatches', 'must not be negative', 0)

    def idle(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """Returns the defaults of what was given and does nothing on a mesh of these sizes."""
        axes = {'microbatches': 'stages', 'context': 'length'}
        default = {name: getattr(type(self), name) for name in axes}
        return {
            name: default[name]
            for name, what in axes.items()
            if all(sizes[axis] == 1 for axis in ACTIVATIONS[what])
            and getattr(self, name) != default[name]
        }

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raises UsageError where something that was given does nothing on a mesh."""
        mesh = f'--mesh={mesh_text(sizes) or "data=1"}'
        does = {
            'microbatches': f'cuts a batch for the stages of a pipeline, and {mesh} has none',
            'context': f'says how positions on other devices are seen, and {mesh} splits none',
        }
        for name, default in self.idle(sizes).items():
            need(False, self, name, does[name], default)

    def fields(self) -> dict[str, Any]:
        """Returns the fields of `bigjax.models.decoder.DecoderLM` of the same names."""
        return dataclasses.asdict(self)
