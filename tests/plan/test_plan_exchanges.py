"""What decoders' compiled programs compute, and send along each axis, against the closed form.

`data/exchanges.json` has what programs of libtpu 0.0.52 said, by axes of at least a hundredth of
all that is sent, and of some the peak of HBM without code; small ones are compiled again here.
"""

import json
from collections import Counter
from pathlib import Path

import pytest

from bigjax.plan.assess import assess, by_closed_form
from bigjax.plan.options import PlanOptions
from bigjax.plan.topology import parse

PROGRAMS = json.loads((Path(__file__).parent / 'data' / 'exchanges.json').read_text('utf-8'))


def name(row) -> str:
    values = row['values']
    size, tokens = values.get('width') or values['size'], values['batch'] * values['seq']
    return ' '.join(map(str, (row['topology'], values['mesh'], values['remat'], size, tokens)))


def check(sent: dict[str, float], closed) -> None:
    """Asserts 5 % along each axis, and that no term of a ninth could be left out."""
    expected: Counter = Counter()
    for term in closed.collectives:
        expected[','.join(term.axes)] += term.bytes
    for axes, amount in sent.items():
        assert expected[axes] == pytest.approx(amount, rel=0.05)
        for term in closed.collectives:
            if ','.join(term.axes) == axes and term.bytes > 0.11 * amount:
                assert expected[axes] - term.bytes != pytest.approx(amount, rel=0.05)


@pytest.mark.parametrize('row', PROGRAMS, ids=name)
def test_a_program_does_what_arithmetic_says(row):
    experiment = row.get('experiment', 'llama')
    closed = by_closed_form(experiment, row['values'], parse(row['topology'])).closed
    assert closed.executed_flops == pytest.approx(row['flops'], rel=1e-3)
    check(row['bytes'], closed)


@pytest.mark.parametrize('row', [row for row in PROGRAMS if 'hbm' in row], ids=name)
def test_a_program_holds_what_arithmetic_says(row):
    experiment = row.get('experiment', 'llama')
    held = by_closed_form(experiment, row['values'], parse(row['topology'])).closed.memory.bytes
    assert sum(held.values()) - held['program'] == pytest.approx(row['hbm'], rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize('mesh', ['data=4', 'fsdp=2,tensor=2'])
def test_a_program_compiled_here_does_so_too(mesh, tmp_path):
    pytest.importorskip('libtpu')
    (row,) = (r for r in PROGRAMS if (r['topology'], r['values']['mesh']) == ('v5e:2x2', mesh))
    values = row['values'] | {'attention': 'xla', 'seq': 256}
    found = assess('llama', values, parse('v5e:2x2'), PlanOptions(topology='v5e:2x2'), tmp_path)
    assert found.walk
    assert found.closed.executed_flops == pytest.approx(found.walk.flops, rel=1e-3)
    sent: Counter = Counter()
    for term in found.walk.collectives:
        sent[','.join(term.axes)] += term.bytes
    check({axes: n for axes, n in sent.items() if n > 0.01 * sent.total()}, found.closed)
