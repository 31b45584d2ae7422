"""What XLA is told beside the program of a train step."""

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from bigjax.sharding import LOGICAL_TO_MESH

_FSDP = LOGICAL_TO_MESH['embed']
# Sums between slices are short where they take at most a fortieth of the time of what they are of.
# For each parameter all slices together send 4 bytes for every slice but one; a device of v4 to v6e
# has 63 to 88 thousand FLOPs for each byte between slices (bigjax/plan/hardware.py).
_SHORT = 40 * 4 * 75_000  # FLOPs of a gradient for each parameter and slice but one
# With fewer parameters layers are narrow, and are slower where such sums are in the loop: libtpu
# then joins less of what is no product.
_LARGE = 5_000_000_000


def has_scatter(sides: Sequence[int]) -> bool:
    """Returns whether libtpu scatters sums among all devices of a slice with these sides.

    It does among those of two different sides, of one, or of four chips, and among any part of a
    slice. Of a square or a box it sums the whole on every device, which sends twice as much, even
    where the program asks for a scatter (seen of libtpu 0.0.52, v5e, v6e and v5p).
    """
    long = [side for side in sides if side > 1]
    return len(long) < 2 or long == [2, 2] or (len(long) == 2 and long[0] != long[1])


def compiler_options(mesh: Mesh, parameters: int, flops: float) -> dict[str, str]:
    """Returns the options of `jax.jit` for the train step.

    Args:
      mesh: axes as of `bigjax.mesh.make_mesh`.
      parameters: how many the model has.
      flops: floating-point operations of one gradient, on all devices.
    """
    devices = list(mesh.devices.flat)
    if devices[0].platform != 'tpu':
        return {}
    options = {
        # The scheduler keeps a part of the HBM free by default, and a program that needs that part
        # hides no exchange at all behind what is computed: a 64B on 64 chips of v5p then takes a
        # sixth longer. What does not fit is refused either way.
        'xla_tpu_scheduler_percent_shared_memory_limit': '100',
        # A product whose operand is gathered, or whose result is scattered, is cut into a ring of
        # small products by default. These send more than the exchange needs, and are most often
        # predicted to be slower than one: bigjax/plan/README.md has both.
        'xla_tpu_enable_windowed_einsum_for_all_gather': 'false',
    }
    sides = [len(set(places)) for places in zip(*(d.coords for d in devices), strict=True)]
    # Where there is no other scatter, such a ring is one.
    if mesh.shape[_FSDP] < mesh.size or has_scatter(sides):
        options['xla_tpu_enable_windowed_einsum_for_reduce_scatter'] = 'false'
    slices = _slices_along_data(mesh)
    if slices > 1 and parameters > _LARGE and flops > _SHORT * parameters * (slices - 1):
        # Sums between slices are waited for a layer later by default, for which the backward pass
        # of one layer is taken out of the loop: half as much program again, and more of the HBM.
        # Short ones need no such wait: bigjax/plan/README.md has both.
        options['xla_tpu_explicit_control_dcn_collective_pipelining'] = 'true'
    return options


def _slices_along_data(mesh: Mesh) -> int:
    """How many slices there are, if nothing but the data axis goes from one to another; else 0."""
    slices = [
        {getattr(device, 'slice_index', 0) for device in part.flat}
        for part in np.moveaxis(mesh.devices, mesh.axis_names.index('data'), 0)
    ]
    return len(set.union(*slices)) if max(map(len, slices)) == 1 else 0
