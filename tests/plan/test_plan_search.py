"""Searches: what is tried, in which order it stands, and that it is tried once."""

import dataclasses

import pytest

from bigjax.plan import assess as assessing
from bigjax.plan import search as searching
from bigjax.plan.assess import by_closed_form
from bigjax.plan.candidates import every, meshes, smaller
from bigjax.plan.options import PlanOptions
from bigjax.plan.plan import plan
from bigjax.plan.program.compiled import CompileError
from bigjax.plan.topology import parse
from bigjax.plan.ways_out import ways_out

MODEL = {
    'depth': 8, 'width': 2048, 'heads': 16, 'kv_heads': 16, 'hidden': 8192, 'vocab': 32000,
    'seq': 2048, 'batch': 64, 'scan': True, 'dtype': 'bfloat16', 'mesh': 'fsdp=16',
    'remat': 'full', 'attention': 'tpu',
}  # fmt: skip


@pytest.fixture(scope='module')
def known():
    """The configuration that was asked for, by arithmetic."""
    return by_closed_form('llama', MODEL, parse('h100:16'))


def test_meshes_are_of_all_devices(known):
    texts = meshes(known)
    assert texts[0] == 'fsdp=16'
    assert 'fsdp=8,tensor=2' in texts
    assert texts[-1] == 'data=16'
    assert len(texts) == len(set(texts)) >= 6
    slices = by_closed_form('llama', {**MODEL, 'mesh': 'data=2,fsdp=8'}, parse('2*v5e:2x4'))
    assert meshes(slices)[0] == 'data=2,fsdp=8'


def test_a_search_ranks_good_and_bad_ones(tmp_path):
    options = PlanOptions(topology='h100:16', search=True, tries=8)
    rows = plan('llama', MODEL, options, tmp_path)['search']
    assert len(rows) == 8
    fitting = [row for row in rows if row['fits']]
    assert [row['fits'] for row in rows] == [True] * len(fitting) + [False] * (8 - len(fitting))
    speeds = [row['tokens_per_second'] for row in fitting]
    assert speeds == sorted(speeds, reverse=True)
    assert len({row['mesh'] for row in rows}) >= 3
    assert len({row['flags'] for row in rows}) == 8


def test_the_worst_are_among_those_tried(known):
    guessed = [
        (change, searching.closed('llama', known, change)) for change in every('llama', known)
    ]
    guessed = [pair for pair in guessed if pair[1]]
    picked = searching.chosen(guessed, 8)
    assert len(picked) == 8
    speeds = sorted(
        way.tokens_per_step / way.closed.predicted_seconds for _, way in guessed if way.fits
    )
    own = [
        way.tokens_per_step / way.closed.predicted_seconds
        for change, way in guessed
        if change in picked and way.fits
    ]
    assert max(own) == speeds[-1]
    assert min(own) < speeds[len(speeds) // 2]


def test_what_failed_to_compile_is_told_and_others_go_on(known, tmp_path, monkeypatch):
    def fails(request, kept, timeout):
        raise CompileError('no such flag')

    monkeypatch.setattr(assessing, 'compile_step', fails)
    monkeypatch.setattr(assessing, 'libtpu_missing', lambda: '')
    found = assessing.assess(
        'llama',
        {**MODEL, 'mesh': 'fsdp=4'},
        parse('v5p-8'),
        PlanOptions(topology='v5p-8'),
        tmp_path,
    )
    assert found.compiled is None
    assert found.notes[0] == ('the compiler gave no program, this is the closed form: no such flag')


def test_changes_that_keep_the_model_come_before_those_that_do_not(known, tmp_path):
    large = by_closed_form('llama', {**MODEL, 'batch': 4096, 'remat': 'none'}, parse('h100:16'))
    assert not large.fits
    first = next(iter(smaller('llama', large)))
    assert first == {'remat': 'minimal'}
    ways, note = ways_out('llama', large, PlanOptions(topology='h100:16'), tmp_path)
    assert note == ''
    assert 'batch' not in ways[0]['flags']
    assert all(way['fits'] for way in ways)


def test_a_knob_that_an_experiment_lacks_is_not_tried():
    found = by_closed_form('mlp', {}, parse('v5e:2x2'))
    assert dataclasses.is_dataclass(found)
    assert all('remat' not in change for change in every('mlp', found))
    assert all('remat' not in change for change in smaller('mlp', found))
