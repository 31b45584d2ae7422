"""The machines that a plan is made for: peaks, memories and networks of each generation.

Sources. Peak, clock and memory rate: `pallas_kernels.chip`; v4's, and the rates of int8 and fp8:
cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} and NVIDIA's data sheets (H100, H200, B200). HBM
of a TPU: the "available HBM" that libtpu 0.0.52 names when a program does not fit; of a GPU: what
nvidia-smi calls its total. Links: the same pages give the sum of both directions of all links, 400,
800 and 1,200 GB/s a chip of v5e, v6e and v5p (v7x too), 4 links on a 2-D and 6 on a 3-D torus;
v4 has six of 50 GB/s (Jouppi et al. 2023, arXiv:2304.01433, table 4). That both devices of a v7x
chip exchange at six times the rate of a chip's link is assumed. Network between slices:
50 Gb/s a chip (v5p), 6.4 and 25.6 Tb/s a pod of 256 (v5e, v6e), 100 Gb/s a chip (v7x), 400 Gb/s
a GPU; v4's is taken to be v5e's and v7x's v6e's, for their pages give none.
"""

import dataclasses

from pallas_kernels.chip import CHIPS

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """One generation. A device is what JAX shows as one: a chip, but half a chip of v7x.

    Attributes:
      name: 'v5p', 'h100', ….
      kind: what `jax.Device.device_kind` says.
      peak_flops: bfloat16 operations per second of a device.
      int8_flops: the same of int8.
      fp8_flops: the same of fp8.
      clock_hz: cycles per second.
      cores: TensorCores of a device, streaming multiprocessors of a GPU.
      hbm_bytes: memory of a device that a program can have.
      hbm_bytes_per_s: its rate.
      ici_bytes_per_s: of one link of a device, one way; of a GPU, of its whole NVLink.
      chip_bytes_per_s: between the devices of one chip, one way; 0 where it is one device.
      dimensions: of the torus, with two links each; 0 is a switch (NVLink).
      dcn_bytes_per_s: between slices (hosts of GPUs), of a device.
      devices_per_chip: 2 on v7x.
      chips_per_host: of a machine in a slice of several.
      largest: chips of the largest slice that can be had.
      topology: what `jax.experimental.topologies` calls the generation; '' where it cannot
        compile without a device.
      chip_config: its name for how cores become devices; '' is its default.
      cores_in_name: how many a chip counts in product names, such as 2 in v5p-1024 for 512 chips.
    """

    name: str
    kind: str
    peak_flops: float
    int8_flops: float
    fp8_flops: float
    clock_hz: float
    cores: int
    hbm_bytes: int
    hbm_bytes_per_s: float
    ici_bytes_per_s: float
    dimensions: int
    dcn_bytes_per_s: float
    chip_bytes_per_s: float = 0.0
    devices_per_chip: int = 1
    chips_per_host: int = 4
    largest: int = 256
    topology: str = ''
    chip_config: str = ''
    cores_in_name: int = 1

    @property
    def is_tpu(self) -> bool:
        """Whether it is a TPU, which programs can be compiled for without having one."""
        return bool(self.topology)

    @property
    def ring_bytes_per_s(self) -> float:
        """What one device sends along one dimension of the torus, both links used."""
        return self.ici_bytes_per_s * (2 if self.dimensions else 1)


def _known(name: str) -> dict:
    chip = CHIPS[name]
    return {
        'name': name,
        'kind': chip.kind,
        'peak_flops': chip.peak_flops,
        'clock_hz': chip.clock_hz,
        'cores': chip.cores,
        'hbm_bytes_per_s': chip.hbm_bytes_per_s,
        'topology': chip.topology.partition(':')[0],
    }


HARDWARE: dict[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        Hardware(
            name='v4', kind='TPU v4', topology='v4', chip_config='megacore', cores=2,
            peak_flops=275e12, int8_flops=275e12, fp8_flops=275e12, clock_hz=1.05e9,
            hbm_bytes=int(30.75 * GIB), hbm_bytes_per_s=1.2e12,
            ici_bytes_per_s=50e9, dimensions=3, dcn_bytes_per_s=3.125e9,
            largest=4096, cores_in_name=2,
        ),
        Hardware(
            **_known('v5e'), int8_flops=393e12, fp8_flops=197e12, hbm_bytes=int(15.75 * GIB),
            ici_bytes_per_s=50e9, dimensions=2, dcn_bytes_per_s=3.125e9,
        ),
        Hardware(
            **_known('v5p'), int8_flops=918e12, fp8_flops=459e12, hbm_bytes=int(95.73 * GIB),
            ici_bytes_per_s=100e9, dimensions=3, dcn_bytes_per_s=6.25e9,
            largest=6144, cores_in_name=2,
        ),
        Hardware(
            **_known('v6e'), int8_flops=1836e12, fp8_flops=918e12, hbm_bytes=int(31.24 * GIB),
            ici_bytes_per_s=100e9, dimensions=2, dcn_bytes_per_s=12.5e9,
        ),
        # A chip's links and network are shared by its two devices.
        Hardware(
            **_known('v7x'), int8_flops=1155e12, fp8_flops=2307e12, hbm_bytes=int(94.74 * GIB),
            ici_bytes_per_s=50e9, dimensions=3, dcn_bytes_per_s=6.25e9, devices_per_chip=2,
            chip_bytes_per_s=600e9, largest=9216, cores_in_name=2,
        ),
        Hardware(
            **_known('h100'), int8_flops=1979e12, fp8_flops=1979e12, hbm_bytes=int(79.6 * GIB),
            ici_bytes_per_s=450e9, dimensions=0, dcn_bytes_per_s=50e9, chips_per_host=8,
            largest=16384,
        ),
        Hardware(
            **_known('h200'), int8_flops=1979e12, fp8_flops=1979e12, hbm_bytes=int(140.4 * GIB),
            ici_bytes_per_s=450e9, dimensions=0, dcn_bytes_per_s=50e9, chips_per_host=8,
            largest=16384,
        ),
        Hardware(
            **_known('b200'), int8_flops=4500e12, fp8_flops=4500e12, hbm_bytes=int(179 * GIB),
            ici_bytes_per_s=900e9, dimensions=0, dcn_bytes_per_s=50e9, chips_per_host=8,
            largest=16384,
        ),
    )
}  # fmt: skip
