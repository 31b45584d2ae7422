"""Programs that others wrote are walked from their text, a machine and a mesh."""

from pathlib import Path

import pytest

from bigjax.plan.hardware import HARDWARE
from bigjax.plan.program import foreign
from bigjax.run import UsageError

PROGRAM = str(Path(__file__).parent / 'data' / 'llama_v5p.hlo')


@pytest.mark.parametrize(('outer', 'inner'), [('fsdp', 'tensor'), ('rows', 'columns')])
def test_exchanges_run_over_the_links_of_their_sides(outer: str, inner: str) -> None:
    found = foreign.read(PROGRAM, 'v5p:2x2x4', f'{outer}=4,{inner}=4')
    assert found.kernel_flops == 4 * 2 * 2 * 4 * 2 * 128 * 512 * 513 / 2
    link = HARDWARE['v5p'].ici_bytes_per_s
    # No side of so small a slice is a ring: the outer axis has one link of two sides each.
    links = {(outer,): 2, (inner,): 1}
    rows = [row for row in found.collectives if row.kind != 'collective-permute']
    assert {row.axes for row in rows} >= set(links)
    for row in rows:
        if row.axes in links:
            assert row.seconds == pytest.approx(row.bytes / (links[row.axes] * link))


def test_all_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    foreign.main([PROGRAM, '--topology=v5p:2x2x4', '--mesh=fsdp=4,tensor=4'])
    said = capsys.readouterr().out
    found = foreign.read(PROGRAM, 'v5p:2x2x4', 'fsdp=4,tensor=4')
    assert '(predicted)' in said.splitlines()[0]
    for row in found.collectives:
        assert f'{row.bytes / 1e9:.4g} GB in {row.count:.0f}' in said


@pytest.mark.parametrize(
    ('program', 'topology', 'mesh', 'flag'),
    [
        (PROGRAM, 'v5p:2x2x4', 'fsdp=15', '--mesh=fsdp=16'),
        (PROGRAM, 'v5p:2x2x4', 'fsdp=1,fsdp=16', '--mesh=fsdp=16'),
        (PROGRAM, 'v5p:2x2x4', 'fsdp=16,tensor', '--mesh=fsdp=16'),
        (PROGRAM, 'h100:8', '', '--topology=v5p:8x8x8'),
        (PROGRAM, '2*v5p:4x4x4', '', '--topology=v5p:8x8x8'),
        ('missing.txt', 'v5p:2x2x4', '', 'as_text()'),
    ],
    ids=['count', 'twice', 'no size', 'gpu', 'slices', 'no file'],
)
def test_what_cannot_be_walked_is_named(program, topology, mesh, flag) -> None:
    with pytest.raises(UsageError) as raised:
        foreign.read(program, topology, mesh)
    assert f'try {flag}' in str(raised.value) or flag in str(raised.value)


def test_a_text_that_is_no_program_ends_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / 'notes.txt').write_text('no program')
    with pytest.raises(SystemExit, match='no ENTRY'):
        foreign.main([str(tmp_path / 'notes.txt')])
