"""The arithmetic and the traffic that any implementation of an op has to do."""

import dataclasses

from pallas_kernels.chip import Chip

OURS = 'pallas_kernels'  # the side of a comparison that is not a rival


@dataclasses.dataclass(frozen=True)
class Work:
    """Arithmetic and traffic that no implementation can do without.

    Attributes:
      flops: of the matrix products that count (attention: over the pairs that are seen).
      mxu_flops: the same, with the padding that the MXU cannot avoid.
      hbm_bytes: operands and results, each moved once.
    """

    flops: float
    mxu_flops: float
    hbm_bytes: float

    def roofline_seconds(self, chip: Chip) -> float:
        """The longer of the arithmetic at the chip's peak and the traffic at its bandwidth."""
        return max(self.flops / chip.peak_flops, self.hbm_bytes / chip.hbm_bytes_per_s)
