"""What the parts of a plan hand to each other.

Everything is of one step and one device unless its name says otherwise; a v5p chip is one device,
a v7x chip two. FLOPs count two for a multiply-add.
"""

import dataclasses

# Of what one device holds at the peak, in the order of a report.
CATEGORIES = (
    'parameters', 'optimizer', 'gradients', 'activations', 'collectives', 'program', 'other',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange between devices.

    Attributes:
      kind: 'all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all' or 'collective-permute'.
      axes: names of the mesh axes whose devices take part, outermost first.
      bytes: what one device sends in all executions: (n - 1) / n of an all-gather's result, of a
        reduce-scatter's or an all-to-all's operand, twice that of an all-reduce's operand, all of
        a permute's, n being the devices of a group.
      count: executions in a step.
      network: 'ici' or 'dcn'.
      seconds: all executions at the links' speed.
      exposed_seconds: what of them no computation hides.
      what: what is exchanged, where that is known, such as 'parameters'.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: float
    count: float
    network: str = 'ici'
    seconds: float = 0.0
    exposed_seconds: float = 0.0
    what: str = ''


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Where the seconds of a step go.

    Attributes:
      matmul: matrix products and convolutions of the compiler.
      kernels: Pallas kernels.
      other: everything else that is computed.
      exposed: collectives that nothing hides.
      hidden: collectives beside computation, not part of the sum.
    """

    matmul: float
    kernels: float
    other: float
    exposed: float
    hidden: float = 0.0

    @property
    def seconds(self) -> float:
        """The step's length."""
        return self.matmul + self.kernels + self.other + self.exposed


@dataclasses.dataclass(frozen=True)
class Walk:
    """What the compiled program of a step says of it.

    Attributes:
      low: the timeline with matrix products at a fixed share of the peak.
      high: with the compiler's own cycles.
      flops: executed, counted with trip counts, Pallas kernels' included.
      kernel_flops: those of Pallas kernels among them.
      hbm_bytes: read and written, where the program says so.
      collectives: by kind and axes.
      rematerialized_flops: of products that the compiler itself computes twice to save memory.
      notes: what a reader must know, such as kernels without a figure.
    """

    low: Timeline
    high: Timeline
    flops: float
    kernel_flops: float
    hbm_bytes: float
    collectives: tuple[Collective, ...]
    rematerialized_flops: float = 0.0
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that one device holds at the peak of a step.

    Attributes:
      bytes: by category, every one of `CATEGORIES`.
      total: the compiler's peak, or the sum where nothing was compiled.
      host_bytes: what lies in the host's memory instead.
    """

    bytes: dict[str, int]
    total: int
    host_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class ClosedForm:
    """What a step takes by arithmetic alone, with no compiler.

    Attributes:
      model_flops: of all devices: forward and backward, full scores, nothing computed twice (the
        convention of Chowdhery et al. 2022, appendix B).
      causal_flops: the same with the scores that a causal mask leaves.
      executed_flops: of one device: what is computed again counts, masked blocks do not.
      memory: by category.
      collectives: by kind and axes, with seconds at the links' speed and all of them exposed.
      roofline_seconds: the larger of executed FLOPs at peak, HBM bytes and links' bytes.
      predicted_seconds: the roofline over what its generation is known to reach.
      efficiency: that known share, and where it is from.
      hbm_bytes: read and written.
      bounds: seconds of each thing that can bound a step, were it alone; the roofline is the most.
      notes: what a reader must know, such as where the efficiency is from and what is not counted.
    """

    model_flops: float
    causal_flops: float
    executed_flops: float
    memory: Memory
    collectives: tuple[Collective, ...]
    roofline_seconds: float
    predicted_seconds: float
    efficiency: float
    hbm_bytes: float = 0.0
    bounds: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
