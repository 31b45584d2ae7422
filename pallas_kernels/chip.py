"""The chips that kernels are written for: their units, clocks and memories, and which one this is.

The figures of a TPU are those of one JAX device: v5p joins its two TensorCores into a device,
v7x shows each of its two as a device of its own. Peaks are for bfloat16 and are the vendors'.
"""

import dataclasses

import jax

MIB = 1024**2


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator as JAX sees it.

    Attributes:
      name: generation, such as 'v6e' or 'h100'.
      kind: what `jax.Device.device_kind` says.
      mxu: side of a systolic array (a matmul's contraction is padded to it); 0 on a GPU.
      clock_hz: cycles per second, peak_flops / (floating-point operations of a cycle).
      cores: TensorCores of a device (streaming multiprocessors on a GPU).
      peak_flops: bfloat16 operations per second of a device.
      hbm_bytes_per_s: memory bandwidth of a device.
      vmem_bytes: VMEM of a core (shared memory of a multiprocessor on a GPU).
      vmem_limit: the most that a kernel here asks the compiler for, in bytes.
      topology: the name `jax.experimental.topologies` knows the generation by; '' on a GPU.
    """

    name: str
    kind: str
    mxu: int
    clock_hz: float
    cores: int
    peak_flops: float
    hbm_bytes_per_s: float
    vmem_bytes: int
    vmem_limit: int
    topology: str = ''

    @property
    def is_tpu(self) -> bool:
        """Whether the chip is a TPU."""
        return bool(self.topology)

    @property
    def flops_per_cycle(self) -> float:
        """bfloat16 operations of one core in one cycle."""
        return self.peak_flops / self.cores / self.clock_hz


def _tpu(name, kind, mxu, cores, peak_flops, hbm, vmem_mib, topology) -> Chip:
    # A cycle multiplies four 128 x 128 tiles on v5, and four 256 x 256 on v6e and v7x.
    clock_hz = peak_flops / cores / (2 * 4 * mxu * mxu)
    # A quarter of VMEM stays with the compiler: its own buffers, fusions next to the kernel.
    vmem_limit = vmem_mib * MIB * 3 // 4
    return Chip(
        name, kind, mxu, clock_hz, cores, peak_flops, hbm, vmem_mib * MIB, vmem_limit, topology
    )


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        _tpu('v5e', 'TPU v5 lite', 128, 1, 197e12, 0.82e12, 128, 'v5e:2x2'),
        _tpu('v5p', 'TPU v5', 128, 2, 459e12, 2.46e12, 64, 'v5p:2x2x1'),
        _tpu('v6e', 'TPU v6 lite', 256, 1, 920e12, 1.64e12, 128, 'v6e:2x2'),
        _tpu('v7x', 'TPU7x', 256, 1, 1155e12, 3.70e12, 64, 'tpu7x:2x2x1'),
        Chip('h100', 'NVIDIA H100', 0, 1.755e9, 132, 989e12, 3.35e12, 227 * 1024, 227 * 1024),
        # H100's die with other memory: 4.8 TB/s, as NVIDIA's data sheet is quoted elsewhere.
        Chip('h200', 'NVIDIA H200', 0, 1.755e9, 132, 989e12, 4.8e12, 227 * 1024, 227 * 1024),
        Chip('b200', 'NVIDIA B200', 0, 1.85e9, 148, 2250e12, 8.0e12, 227 * 1024, 227 * 1024),
    )
}
TPUS: tuple[str, ...] = tuple(name for name, chip in CHIPS.items() if chip.is_tpu)
_ALIASES = {'TPU v5e': 'v5e', 'TPU v5p': 'v5p', 'TPU v6e': 'v6e', 'TPU7': 'v7x'}


def named(name: str) -> Chip:
    """The chip called `name`; ValueError names the known ones."""
    if name not in CHIPS:
        raise ValueError(f'chip must be one of {", ".join(CHIPS)}, not {name!r}')
    return CHIPS[name]


def from_kind(kind: str) -> Chip | None:
    """The chip of a `device_kind`, or None if it is no chip of the table (a CPU, say)."""
    if kind in _ALIASES:
        return CHIPS[_ALIASES[kind]]
    for chip in CHIPS.values():
        # The kind of a GPU goes on with its memory: 'NVIDIA H100 80GB HBM3'.
        if kind == chip.kind or (not chip.is_tpu and kind.startswith(chip.kind + ' ')):
            return chip
    return None


def accelerator() -> str | None:
    """The kind of device that code traced now will run on; None is a CPU.

    An abstract mesh that names a device wins (a compile ahead of time says so for what it
    compiles); else it is the default device.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device
    if device is None or isinstance(device, str):  # a platform's name
        device = jax.local_devices(backend=device)[0]
    return None if device.platform == 'cpu' else device.device_kind


def current_chip() -> Chip | None:
    """The chip that code traced now will run on (see `accelerator`), or None if it is not known."""
    kind = accelerator()
    return None if kind is None else from_kind(kind)
