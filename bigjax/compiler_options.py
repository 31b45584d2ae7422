"""What XLA is told beside the program of a train step."""

from jax.sharding import Mesh

# By default the scheduler keeps a part of the HBM free, and a program that needs that part hides no
# exchange at all behind what is computed: a 64B on 64 chips of v5p then takes a sixth longer. What
# does not fit is refused either way.
_TPU = {'xla_tpu_scheduler_percent_shared_memory_limit': '100'}


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """Returns the options of `jax.jit` for the train step on the devices of a mesh."""
    return dict(_TPU) if mesh.devices.flat[0].platform == 'tpu' else {}
