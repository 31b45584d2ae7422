"""What XLA is told beside the program of a train step."""

from collections.abc import Sequence

from jax.sharding import Mesh

from bigjax.sharding import LOGICAL_TO_MESH

_FSDP = LOGICAL_TO_MESH['embed']


def has_scatter(sides: Sequence[int]) -> bool:
    """Returns whether libtpu scatters sums among all devices of a slice with these sides.

    It does among those of two different sides, of one, or of four chips, and among any part of a
    slice. Of a square or a box it sums the whole on every device, which sends twice as much, even
    where the program asks for a scatter (seen of libtpu 0.0.52, v5e, v6e and v5p).
    """
    long = [side for side in sides if side > 1]
    return len(long) < 2 or long == [2, 2] or (len(long) == 2 and long[0] != long[1])


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """Returns the options of `jax.jit` for the train step on the devices of a mesh."""
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
    return options
