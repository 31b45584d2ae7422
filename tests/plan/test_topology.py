"""Names of machines: what they mean, and what is said of those that do not exist."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigjax.plan.hardware import HARDWARE
from bigjax.plan.program import compile
from bigjax.plan.topology import parse, shapes
from bigjax.run import UsageError
from pallas_kernels.chip import CHIPS

TPUS = [hardware for hardware in HARDWARE.values() if hardware.is_tpu]


@pytest.mark.parametrize(
    ('text', 'name', 'chips', 'devices', 'hosts'),
    [
        ('v5p:8x8x8', 'v5p:8x8x8', 512, 512, 128),
        ('v5p-1024', 'v5p:8x8x8', 512, 512, 128),
        ('v5p-2048', 'v5p:8x8x16', 1024, 1024, 256),
        ('v4-8', 'v4:2x2x1', 4, 4, 1),
        ('v5e:2x4', 'v5e:2x4', 8, 8, 1),
        ('v5e-256', 'v5e:16x16', 256, 256, 64),
        ('v5litepod-16', 'v5e:4x4', 16, 16, 4),
        ('4*v5e:16x16', '4*v5e:16x16', 1024, 1024, 256),
        ('2*v6e-256', '2*v6e:16x16', 512, 512, 128),
        ('tpu7x:4x4x4', 'v7x:4x4x4', 64, 128, 16),
        ('h100:4', 'h100:4', 4, 4, 1),
        ('h100:64', 'h100:64', 64, 64, 8),
        ('b200-16', 'b200:16', 16, 16, 2),
        ('h200:8', 'h200:8', 8, 8, 1),
    ],
)
def test_names(text, name, chips, devices, hosts):
    topology = parse(text)
    assert topology.name == name
    assert (topology.chips, topology.devices, topology.hosts) == (chips, devices, hosts)
    assert parse(topology.name) == topology


@pytest.mark.parametrize('hardware', TPUS, ids=lambda hardware: hardware.name)
def test_every_slice_can_be_named(hardware):
    for shape in shapes(hardware):
        topology = parse(f'{hardware.name}:{"x".join(map(str, shape))}')
        assert topology.shape == shape
        assert topology.chips == math.prod(shape) <= hardware.largest
        assert topology.hosts * 8 >= topology.chips


def test_rings_are_the_sides_that_close():
    assert parse('v5e:8x16').wrap == (False, True)
    assert parse('v5p:2x4x4').wrap == (False,) * 3
    assert parse('v5p:4x4x8').wrap == (True,) * 3


@pytest.mark.parametrize(
    ('name', 'wrap'),
    [
        ('v5p:4x4x8', (True, True, True)),
        ('v5p:2x4x4', (False, False, False)),
        ('v5e:8x16', (False, True, False)),
        ('2*v6e:16x16', (True, True, False)),
    ],
)
def test_the_compiler_is_told_which_sides_are_rings(name, wrap, monkeypatch) -> None:
    asked = {}
    described = SimpleNamespace(devices=[])
    monkeypatch.setattr(
        compile.topologies,
        'get_topology_desc',
        lambda **options: asked.update(options) or described,
    )
    compile.devices(parse(name))
    assert asked['wrap'] == wrap


V5P = (
    'a slice of v5p is 2x2x1, 2x2x2, 2x2x4, 2x4x4 or has three sides that are multiples of 4, the '
    'shorter first, and at most 6144 chips'
)
V5E = 'a slice of v5e is one of 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16'
FORM = 'must be GENERATION:SIDExSIDE…, SLICES*GENERATION:…, gpu:COUNT or a product name such as'
KNOWN = 'there are v4, v5e, v5p, v6e, v7x, h100, h200, b200'


@pytest.mark.parametrize(
    ('text', 'rule', 'works'),
    [
        ('', 'is empty; name the chips to plan for', 'v5p:8x8x8'),
        ('v5p', f'{FORM} v5p-1024', 'v5p:4x8x8'),
        ('0*v5e:4x4', f'{FORM} v5p-1024', 'v5e:4x4'),
        ('v5p:3x3x3', V5P, 'v5p:4x4x4'),
        ('v5p:8x4x8', V5P, 'v5p:4x8x8'),
        ('v5p:16x16', V5P, 'v5p:4x8x8'),
        ('v5e:16x32', V5E, '2*v5e:16x16'),
        ('v5e:3x4', V5E, 'v5e:4x4'),
        ('v6p:8x8', f'no generation v6p; {KNOWN}', 'v6e:8x8'),
        ('a100:16', f'no generation a100; {KNOWN}', 'h100:16'),
        ('v5p-1000', 'no slice of v5p has 1000 TensorCores, two a chip', 'v5p:8x8x8'),
        ('v5p-7', 'no slice of v5p has 7 TensorCores, two a chip', 'v5p:2x2x1'),
        ('v5e-300', 'no slice of v5e has 300 chips', 'v5e:16x16'),
        ('h100:12', 'h100 comes as 1, 2, 4 or a multiple of 8 GPUs, 8 a host', 'h100:16'),
        ('h100:2x4', 'h100 comes as 1, 2, 4 or a multiple of 8 GPUs, 8 a host', 'h100:8'),
    ],
)
def test_what_is_said_of_others(text, rule, works):
    with pytest.raises(UsageError) as error:
        parse(text)

    assert str(error.value) == f'--topology={text}: {rule}; try --topology={works}'


@settings(deadline=None)
@given(
    st.from_regex(
        r'(\d{1,2}\*)?(v4|v5e|v5p|v6e|v7x|h100|b200|v9)?[:\-](\d{1,3}(x\d{1,3}){0,3})?',
        fullmatch=True,
    )
)
def test_a_name_means_a_machine_or_the_message_names_one(text):
    try:
        topology = parse(text)
    except UsageError as error:
        topology = parse(str(error).rpartition('try --topology=')[2])
    assert parse(topology.name) == topology
    assert topology.devices >= 1


def test_peaks_are_those_of_the_kernels():
    for name, chip in CHIPS.items():
        hardware = HARDWARE[name]
        assert (hardware.peak_flops, hardware.clock_hz) == (chip.peak_flops, chip.clock_hz)
        assert hardware.kind == chip.kind
        assert hardware.is_tpu == chip.is_tpu
