"""The chip table: consistent figures, and which chip code is traced for."""

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import chip as chip_lib


def _meant_for(kind: str, platform: str = 'tpu', cores: int = 1):
    device = AbstractDevice(kind, cores, platform)
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


@pytest.mark.parametrize('name', chip_lib.TPUS)
def test_figures_are_those_that_jax_knows(name):
    chip = chip_lib.named(name)
    with _meant_for(chip.kind, cores=chip.cores):
        info = pltpu.get_tpu_info()
    assert chip.mxu == info.mxu_column_size
    assert chip.vmem_bytes == info.vmem_capacity_bytes
    assert chip.peak_flops == pytest.approx(info.bf16_ops_per_second * chip.cores, rel=0.01)
    assert chip.hbm_bytes_per_s == pytest.approx(info.mem_bw_bytes_per_second * chip.cores, 0.01)


@pytest.mark.parametrize('chip', chip_lib.CHIPS.values(), ids=lambda chip: chip.name)
def test_a_clock_is_a_clock_and_limits_are_below_what_there_is(chip):
    assert 0.9e9 < chip.clock_hz < 3e9
    assert 0 < chip.vmem_limit <= chip.vmem_bytes
    assert chip.is_tpu == (chip.mxu > 0)


@pytest.mark.parametrize('chip', chip_lib.CHIPS.values(), ids=lambda chip: chip.name)
def test_an_abstract_device_says_what_it_is_traced_for(chip):
    with _meant_for(chip.kind, 'tpu' if chip.is_tpu else 'gpu', chip.cores):
        assert chip_lib.current_chip() == chip


def test_kinds_with_a_memory_size_and_other_names():
    assert chip_lib.from_kind('NVIDIA H100 80GB HBM3').name == 'h100'
    assert chip_lib.from_kind('NVIDIA H200').name == 'h200'
    assert chip_lib.from_kind('TPU v5p').name == 'v5p'
    # v5 must not be taken for v5 lite, nor an unknown card for its neighbour.
    assert chip_lib.from_kind('TPU v5').name == 'v5p'
    assert chip_lib.from_kind('TPU v5 lite').name == 'v5e'
    assert chip_lib.from_kind('NVIDIA H1000') is None


def test_a_cpu_is_no_chip_of_the_table():
    assert chip_lib.current_chip() is None
    with jax.default_device(jax.devices('cpu')[1]):
        assert chip_lib.current_chip() is None
    with jax.default_device('cpu'):
        assert chip_lib.current_chip() is None


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match='v6e'):
        chip_lib.named('v9')
