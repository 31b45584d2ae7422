"""What a compiled program exchanges: groups, axes, bytes, links; toys whose exchange is known."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bigjax.plan.hardware import HARDWARE
from bigjax.plan.program import collectives, hlo
from bigjax.plan.program.fabric import make_fabric
from bigjax.plan.program.timeline import walk
from bigjax.plan.records import Walk

HERE = Path(__file__).parent
ENVIRONMENT = {
    'JAX_PLATFORMS': 'cpu',
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
V5E = HARDWARE['v5e']
MESH = {'fsdp': 4, 'tensor': 4}


def fabric(mesh=MESH, **where):
    return make_fabric(V5E, mesh, **where)


@pytest.mark.parametrize(
    ('text', 'first', 'axes'),
    [
        ('{{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}', [0, 1, 2, 3], ('tensor',)),
        ('{{0,4,8,12},{1,5,9,13},{2,6,10,14},{3,7,11,15}}', [0, 4, 8, 12], ('fsdp',)),
        ('[4,4]<=[16]', [0, 1, 2, 3], ('tensor',)),
        ('[4,4]<=[4,4]T(1,0)', [0, 4, 8, 12], ('fsdp',)),
        ('[2,8]<=[16]', [0, 1, 2, 3, 4, 5, 6, 7], ('fsdp', 'tensor')),
        ("mesh['data'=1,'fsdp'=4,'tensor'=4] {'fsdp'}", [0, 4, 8, 12], ('fsdp',)),
        ("mesh['axis_0'=4,'axis_1'=4] {'axis_1'}", [0, 1, 2, 3], ('tensor',)),
        ("mesh['a'=16] {'a':(1)4}", [0, 4, 8, 12], ('fsdp',)),
        ("mesh['a'=16] {'a':(4)2}", [0, 2], ('tensor',)),
        ("mesh['a'=4,'b'=4], device_ids=([4,4]<=[4,4]T(1,0)) {'b'}", [0, 4, 8, 12], ('fsdp',)),
        ('{}', list(range(16)), ('fsdp', 'tensor')),
    ],
)
def test_replica_groups_in_all_their_forms(text, first, axes) -> None:
    groups = collectives.read_groups(text, fabric())
    assert sorted(groups[0]) == first
    assert sorted(number for group in groups for number in group) == list(range(16))
    assert fabric().axes(groups) == axes


def test_replica_groups_of_another_form_are_refused() -> None:
    with pytest.raises(ValueError, match='unknown form: what'):
        collectives.read_groups('what', fabric())


def test_axes_follow_the_order_of_the_devices() -> None:
    turned = [4 * (i % 4) + i // 4 for i in range(16)]
    assert fabric(device_ids=turned).axes([[0, 1, 2, 3]]) == ('fsdp',)
    assert fabric(device_ids=turned).axes([[0, 4, 8, 12]]) == ('tensor',)


def test_devices_are_counted_in_their_slice_by_a_program_of_one() -> None:
    mesh = {'stage': 2, 'data': 2, 'tensor': 4}
    place = fabric(mesh, dcn_axes={'data': 2}, partitions=8)
    # Stage 1 follows stage 0 of the same slice, with another slice's rows between.
    assert place.places([0, 3, 4, 7]) == [0, 3, 8, 11]
    assert place.axes([[0, 4]]) == ('stage',)
    assert place.size == 8


@pytest.mark.parametrize(
    ('wrap', 'group', 'links'),
    [
        ((True, True), [0, 1, 2, 3], 2),
        ((False, False), [0, 1, 2, 3], 1),
        ((), [0, 1, 2, 3], 2),  # not told: a ring
        ((True, True), [0, 1], 1),  # a part of a side is no ring
        ((True, True), list(range(16)), 4),
        ((True, False), list(range(16)), 3),
    ],
)
def test_links(wrap, group, links) -> None:
    torus = [(i // 4, i % 4) for i in range(16)]
    assert fabric(coordinates=torus, wrap=wrap).links(group) == links
    assert fabric().links(group) == 2


def test_devices_of_a_chip_have_a_link_of_their_own() -> None:
    v7x = HARDWARE['v7x']
    chips = [(x, 0, 0) for x in (0, 0, 1, 1)]
    place = make_fabric(v7x, {'fsdp': 2, 'tensor': 2}, coordinates=chips, wrap=(False,) * 3)
    assert place.rate([0, 1]) == place.rate([2, 3]) == 12 * v7x.ici_bytes_per_s
    assert place.rate([0, 2]) == place.rate([0, 1, 2, 3]) == v7x.ici_bytes_per_s
    assert place.permute_rate([[0, 1], [1, 0], [2, 2]]) == v7x.chip_bytes_per_s
    assert place.permute_rate([[0, 2], [1, 3]]) == v7x.ici_bytes_per_s
    # Of a v5p chip there is one device.
    alone = make_fabric(HARDWARE['v5p'], {'tensor': 2}, coordinates=chips[::2], wrap=(False,) * 3)
    assert alone.rate([0, 1]) == HARDWARE['v5p'].ici_bytes_per_s


def test_hops_go_around_where_there_is_a_way() -> None:
    torus = [(i // 4, i % 4, 0) for i in range(16)]  # as JAX has it, for two sides
    for wrap, far in (((True, True), 1.0), ((False, False), 3.0)):
        place = fabric(coordinates=torus, wrap=wrap)
        assert place.hops([[0, 3], [4, 7]]) == far
        assert place.hops([[0, 10]]) == 4.0
    assert fabric().hops([[0, 3]]) == 1.0


def exchange(line: str, operand: str, **where) -> collectives.Exchange | None:
    text = f'ENTRY %m () -> () {{\n  %x = {operand} parameter(0)\n  ROOT %y = {line}\n}}'
    module = hlo.parse(text)
    return collectives.exchange(module.entry, module.entry.root, fabric(**where))


TENSOR, FSDP = 'replica_groups=[4,4]<=[16]', 'replica_groups=[4,4]<=[4,4]T(1,0)'


@pytest.mark.parametrize(
    ('line', 'operand', 'kind', 'sent', 'links'),
    [
        (f'bf16[400] all-gather(%x), {TENSOR}', 'bf16[100]', 'all-gather', 600, 2),
        (f'(bf16[100], bf16[400]) all-gather-start(%x), {TENSOR}', 'bf16[100]', 'all-gather',
         600, 2),
        (f'bf16[100] reduce-scatter(%x), {TENSOR}', 'bf16[400]', 'reduce-scatter', 600, 2),
        (f'bf16[400] all-reduce(%x), {TENSOR}', 'bf16[400]', 'all-reduce', 1200, 2),
        # The sum is rounded as it is sent.
        (f'bf16[400] all-reduce(%x), {TENSOR}', 'f32[400]', 'all-reduce', 1200, 2),
        (f'bf16[400] all-to-all(%x), {TENSOR}', 'bf16[400]', 'all-to-all', 600, 2),
        ('bf16[400] collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}',
         'bf16[400]', 'collective-permute', 800, 1),
    ],
    ids=['gather', 'start', 'scatter', 'reduce', 'rounded', 'all-to-all', 'permute'],
)  # fmt: skip
def test_bytes_and_seconds(line: str, operand: str, kind: str, sent: int, links: int) -> None:
    found = exchange(line, operand)
    assert found is not None
    assert (found.kind, found.axes, found.bytes, found.network) == (kind, ('tensor',), sent, 'ici')
    assert found.seconds == pytest.approx(sent / (links * 50e9))


def test_a_permute_takes_the_links_between_its_ends() -> None:
    torus = [(i // 4, i % 4) for i in range(16)]
    pairs = 'source_target_pairs={{0,2},{1,3},{2,0},{3,1}}'
    found = exchange(f'bf16[400] collective-permute(%x), {pairs}', 'bf16[400]', coordinates=torus)
    assert found is not None
    assert (found.bytes, found.seconds) == (800, pytest.approx(2 * 800 / 50e9))


def test_alone_there_is_nothing_to_exchange() -> None:
    assert exchange('f32[4] all-reduce(%x), replica_groups=[16,1]<=[16]', 'f32[4]') is None
    permute = 'f32[4] collective-permute(%x), source_target_pairs={{0,0},{1,1}}'
    assert exchange(permute, 'f32[4]') is None


def test_all_reduce_across_slices_sends_a_share_on_the_slow_network() -> None:
    found = exchange(f'f32[400] all-reduce(%x), {FSDP}', 'f32[400]', dcn_axes={'fsdp': 2})
    assert found is not None
    assert (found.network, found.axes, found.bytes) == ('dcn', ('fsdp',), 2 * 0.75 * 1600)
    inside, between = 2 * 0.5 * 1600 / 100e9, 2 * 0.5 * 1600 / 2 / V5E.dcn_bytes_per_s
    assert found.seconds == pytest.approx(inside + between)


def test_slices_exchange_through_the_runtime() -> None:
    """A step's gradients: scattered within a slice, summed between two, as libtpu writes it."""
    found = walk(
        (HERE / 'data' / 'slices_v5e.hlo').read_text(), chip='v5e',
        mesh_shape={'data': 2, 'fsdp': 8}, dcn_axes={'data': 2}, kernels=lambda _: None,
    )  # fmt: skip
    rows = {(row.kind, row.axes, row.network): (row.count, row.bytes) for row in found.collectives}
    weights = 4096 * 1024 * 2
    assert rows == {
        ('all-gather', ('fsdp',), 'ici'): (1, weights * 7 / 8),
        ('reduce-scatter', ('fsdp',), 'ici'): (1, weights * 7 / 8),
        ('all-reduce', ('data',), 'dcn'): (1, weights / 8),
    }
    dcn = next(row for row in found.collectives if row.network == 'dcn')
    assert dcn.exposed_seconds == pytest.approx(weights / 8 / V5E.dcn_bytes_per_s, rel=0.1)


# ---- Programs compiled here ----


@pytest.fixture(scope='module', params=['v5e:4x4', 'v5p:2x2x4'])
def toys(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """What each of the toys' programs says of itself, by name, on a machine."""
    pytest.importorskip('libtpu', reason='the compiler for TPUs; there is none for this system')
    folder = tmp_path_factory.mktemp('toys')
    names = [*EXCHANGED, 'chain'] if request.param == 'v5e:4x4' else EXCHANGED
    command = [sys.executable, str(HERE / 'compile_toys.py'), request.param, str(folder), *names]
    environment = os.environ | ENVIRONMENT
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert child.returncode == 0, child.stderr[-3000:]
    chip = request.param.partition(':')[0]
    return chip, {
        file.stem: walk(
            file.read_text(), chip=chip, mesh_shape=MESH, kernels=lambda _: None,
        )
        for file in folder.glob('*.txt')
    }  # fmt: skip


def rows(found: Walk) -> dict[tuple[str, tuple[str, ...]], tuple[float, float]]:
    return {(row.kind, row.axes): (row.count, row.bytes) for row in found.collectives}


MIB = 2**20
# Of arrays of bfloat16 in compile_toys.py: a layer's weights 2 MiB, 1024 rows 2 MiB, cut by four.
EXCHANGED = {
    'fsdp': {
        ('all-gather', ('fsdp',)): (6, 6 * 2 * MIB * 3 / 4),
        ('reduce-scatter', ('fsdp',)): (6, 6 * 2 * MIB * 3 / 4),
    },
    'tensor': {('all-reduce', ('tensor',)): (1, 2 * MIB / 2 * 3 / 4)},
    'experts': {('all-to-all', ('tensor',)): (2, 2 * MIB / 2 * 3 / 4)},
    'ring': {('collective-permute', ('fsdp',)): (4, 4 * MIB / 2)},
    'pipeline': {('collective-permute', ('fsdp',)): (5, 5 * MIB / 2)},
}
FLOPS = {
    'fsdp': 6 * 3 * 2 * 256 * 1024 * 1024,
    'tensor': 2 * 2 * 256 * 1024 * 512,
    'experts': 2 * 4 * 64 * 1024 * 1024,
    'ring': 4 * 2 * 2 * 256 * 256 * 1024,
    'pipeline': 5 * 2 * 256 * 1024 * 1024,
    'chain': 6 * 2 * 2048**3,
}


@pytest.mark.slow
def test_exchanged_bytes_are_those_of_the_closed_form(toys) -> None:
    _, found = toys
    assert {name: rows(found[name]) for name in EXCHANGED} == EXCHANGED


@pytest.mark.slow
def test_executed_flops_are_those_of_the_closed_form(toys) -> None:
    _, found = toys
    assert {name: said.flops for name, said in found.items()} == {n: FLOPS[n] for n in found}


@pytest.mark.slow
def test_products_take_at_least_their_arithmetic_at_the_peak(toys) -> None:
    chip, found = toys
    for each in found.values():
        assert each.low.seconds <= each.high.seconds
        assert not each.notes
    if 'chain' in found:
        floor = FLOPS['chain'] / HARDWARE[chip].peak_flops
        said = found['chain']
        assert floor < said.low.matmul <= said.high.matmul < 1.5 * floor
