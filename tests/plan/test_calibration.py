"""The published rows, and what is said of the plan's error: all of it is computed again."""

import dataclasses
import json
import statistics

import pytest

from bigjax.experiment import find, knobs
from bigjax.plan import calibration
from bigjax.plan.arithmetic.roofline import ROWS, UNKNOWN, efficiency
from bigjax.plan.arithmetic.shape import parameter_bytes
from bigjax.plan.calibration_compile import knobs as knobs_of_row

FILE = json.loads(ROWS.read_text('utf-8'))
LINES = calibration.lines(FILE['rows'])
NAMES = [line.row['name'] for line in LINES]


def test_names_are_unique_and_every_row_has_a_source():
    assert len(set(NAMES)) == len(NAMES)
    assert all(row['source'] and row['set'] in ('calibration', 'hold-out') for row in FILE['rows'])


def test_the_readme_states_the_errors_that_the_rows_have():
    text = calibration.README.read_text('utf-8')
    written = text.partition(calibration.BEGIN)[2].partition(calibration.END)[0].strip()
    assert written == calibration.table(LINES)


def test_the_efficiencies_are_those_of_the_rows():
    assert FILE['efficiency'] == calibration.efficiencies(LINES)


def test_a_row_is_predicted_by_the_others_alone():
    rows = [row for row in FILE['rows'] if calibration.generation(row) == 'v5e']
    changed = [{**rows[0], 'published': {'step_seconds': 1e3}}, *rows[1:]]
    old, new = calibration.lines(rows), calibration.lines(changed)
    assert new[0].others == old[0].others
    assert new[1].others < old[1].others
    shares = [line.roofline / line.published for line in old[1:]]
    assert old[0].others == statistics.mean(shares)


def test_a_row_that_is_changed_changes_what_is_said_of_the_error():
    changed = dataclasses.replace(LINES[5], published=3 * LINES[5].published)
    ratios = calibration.errors([line.simple for line in (changed, *LINES[:5], *LINES[6:])])
    assert ratios != calibration.errors([line.simple for line in LINES])
    assert ratios[1] > 0.5
    assert '\n'.join(calibration.summary([changed])) not in calibration.table(LINES)


def test_published_seconds_from_every_way_of_saying_it():
    row = FILE['rows'][NAMES.index('Llama2-70B v5p-1024')]
    tokens = row['batch'] * row['length'] / 512
    assert calibration.published_seconds(row) == tokens / 692 == pytest.approx(23.68, abs=0.01)
    # 66.7 %: this file's shape by 16B, 120 TFLOP/s of a v5e's 197, all scores counted.
    row = FILE['rows'][NAMES.index('16B v5e-256')]
    assert calibration.published_seconds(row) == pytest.approx(10.31, abs=0.01)
    assert calibration.published_seconds({**row, 'published': {'step_seconds': 2.0}}) == 2.0


@pytest.mark.parametrize(('name', 'billions'), [
    ('16B v5e-256', 15.8), ('128B v5p-256', 125.1), ('Llama2-70B v5p-1024', 68.98),
    ('Llama3.1-405B v5p-1024', 405.85), ('Mixtral-8x7B v6e-256', 46.7),
    ('GPT3-175B v6e-256', 174.8),
])  # fmt: skip
def test_shapes_are_those_of_the_models(name, billions):
    shape = calibration.shape(FILE['rows'][NAMES.index(name)])
    assert shape.parameters / 1e9 == pytest.approx(billions, abs=0.06)


@pytest.mark.parametrize('row', FILE['rows'], ids=NAMES)
def test_every_row_fits_its_mesh_and_can_be_said_in_knobs(row):
    shape, step = calibration.shape(row), calibration.step(row)
    assert step.devices == step.topology.devices
    assert parameter_bytes(shape, step) * step.size('fsdp', 'tensor', 'stage', 'expert') >= (
        0.99 * 4 * shape.parameters
    )
    name, values = knobs_of_row(row)
    known = knobs(find(name))
    assert not values.keys() - known.keys()
    choices = {knob: known[knob].type for knob in values if isinstance(known[knob].type, tuple)}
    assert all(values[knob] in allowed for knob, allowed in choices.items())


def test_the_closed_form_predicts_published_runs():
    first = [line.simple for line in LINES if line.row['set'] == 'calibration']
    median, worst = calibration.errors(first)
    assert median < 0.1
    assert worst < 0.2
    others = [line.simple for line in LINES if line.row['set'] != 'calibration']
    assert calibration.errors(others)[0] < 0.1


def test_compiled_rows_keep_what_their_ratios_come_from():
    compiled = [line for line in LINES if line.row.get('compiled')]
    for line in compiled:
        found = line.row['compiled']
        for end in ('low', 'high'):
            parts = sum(found[end][part] for part in ('matmul', 'kernels', 'other', 'exposed'))
            assert parts == pytest.approx(found[end]['seconds'])
        low, middle, high = line.range
        assert low <= middle <= high
        assert low * line.published == pytest.approx(
            min(found['low']['seconds'], found['high']['seconds'])
        )


def test_a_generation_without_rows_says_that_its_share_is_a_guess():
    assert efficiency('v5p')[1].startswith('20 published runs of v5p')
    share, source = efficiency('v9')
    assert share == UNKNOWN
    assert 'is a guess' in source


def test_the_table_shows_the_rows_that_are_asked_for(capsys):
    calibration.main(['--rows=Mixtral'])
    printed = capsys.readouterr().out
    assert '| Mixtral-8x7B v6e-256° | 256 | 13.48 s |' in printed
    assert 'Llama' not in printed
