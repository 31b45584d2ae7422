"""What small decoders' compiled programs send along each axis, against the closed form."""

from collections import Counter
from pathlib import Path

import pytest

from bigjax.plan.assess import assess
from bigjax.plan.options import PlanOptions
from bigjax.plan.topology import parse

# Wide enough for the compiler to treat matrices as those of a large model.
SMALL = {
    'depth': 2, 'width': 512, 'heads': 4, 'kv_heads': 4, 'hidden': 2048, 'vocab': 1024, 'seq': 256,
    'batch': 16, 'scan': True, 'dtype': 'bfloat16', 'remat': 'full', 'attention': 'xla',
}  # fmt: skip
MESHES = ('data=4', 'fsdp=4', 'tensor=4', 'fsdp=2,tensor=2')


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled programs are kept from one test to the next."""
    return tmp_path_factory.mktemp('exchanges')


def by_axes(collectives) -> Counter:
    """Bytes by the axes that they are sent along."""
    found: Counter = Counter()
    for row in collectives:
        found[row.axes] += row.bytes
    return found


@pytest.mark.slow
@pytest.mark.parametrize('mesh', MESHES)
def test_a_program_sends_what_arithmetic_says(mesh, folder):
    pytest.importorskip('libtpu')
    topology = parse('v5e:2x2')
    known = assess('llama', SMALL | {'mesh': mesh}, topology, PlanOptions(topology='x'), folder)
    assert known.walk
    sent, expected = by_axes(known.walk.collectives), by_axes(known.closed.collectives)
    large = [axes for axes in sent if sent[axes] > 0.01 * sent.total()]
    assert large == [axes for axes in sent if expected[axes] > 0.01 * expected.total()]
    for axes in large:
        assert expected[axes] == pytest.approx(sent[axes], rel=0.05)
        # No term of a twentieth and more could be left out.
        for row in known.closed.collectives:
            if row.axes == axes and row.bytes > 0.11 * sent[axes]:
                assert expected[axes] - row.bytes != pytest.approx(sent[axes], rel=0.05)
    flops = known.closed.executed_flops
    assert known.walk.flops == pytest.approx(flops, rel=0.01)
