"""Searches: what is tried, in which order it stands, and that it is tried once."""

import dataclasses
import re
from types import SimpleNamespace

import pytest

from bigjax.mesh import parse_mesh
from bigjax.plan import assess as assessing
from bigjax.plan import search as searching
from bigjax.plan.assess import by_closed_form
from bigjax.plan.candidates import closed, every, meshes, smaller
from bigjax.plan.options import PlanOptions
from bigjax.plan.plan import plan, run
from bigjax.plan.program.compiled import CompileError
from bigjax.plan.topology import parse
from bigjax.plan.ways_out import larger, ways_out
from bigjax.run import UsageError

MODEL = {
    'depth': 8, 'width': 2048, 'heads': 16, 'kv_heads': 16, 'hidden': 8192, 'vocab': 32000,
    'seq': 2048, 'batch': 64, 'scan': True, 'dtype': 'bfloat16', 'mesh': 'fsdp=16',
    'remat': 'full',
}  # fmt: skip
# Arithmetic traces the model for each way, which takes longer where layers are scanned.
FAST = {**MODEL, 'mesh': 'fsdp=4', 'scan': False}


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
    assert not any('expert' in text for text in texts)
    sparse = by_closed_form('llama', {**FAST, 'experts': 4}, parse('h100:4'))
    found = [text for text in meshes(sparse) if 'expert' in text]
    assert [parse_mesh(text, 4)['expert'] for text in found] == [2, 4]
    slices = by_closed_form('llama', {**MODEL, 'mesh': 'data=2,fsdp=8'}, parse('2*v5e:2x4'))
    assert meshes(slices)[0] == 'data=2,fsdp=8'


@pytest.fixture(scope='module')
def searched(tmp_path_factory):
    """The rows of a search, every way that arithmetic looked at, and those that were picked."""
    options, seen = PlanOptions(topology='h100:4', search=True, tries=8), []

    def chosen(guessed, tries):
        seen.append((guessed, picked := whole(guessed, tries)))
        return picked

    whole = searching.chosen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searching, 'chosen', chosen)
        rows = plan('llama', FAST, options, tmp_path_factory.mktemp('searched'))['search']
    return rows, *seen[0]


def test_a_search_ranks_good_and_bad_ones(searched):
    rows, _, _ = searched
    [asked] = [row for row in rows if row['asked']]
    assert asked['flags'] == '--mesh=fsdp=4 --batch=64 --remat=full'
    fitting = [row for row in rows if row['fits']]
    room = parse('h100:4').hardware.hbm_bytes
    missed = [r for r in rows if not r['fits'] and r['peak_bytes'] <= searching.LIMIT * room]
    # What was asked for costs nothing more, and for what just misses another one is tried.
    assert 8 <= len(rows) <= 9 + len(missed)
    ruled_out = len(rows) - len(fitting)
    assert [row['fits'] for row in rows] == [True] * len(fitting) + [False] * ruled_out
    speeds = [row['tokens_per_second'] for row in fitting]
    assert speeds == sorted(speeds, reverse=True)
    assert len({row['mesh'] for row in rows}) >= 3
    assert len({row['flags'] for row in rows}) == len(rows)


def test_every_way_is_looked_at(searched):
    _, guessed, _ = searched
    first = by_closed_form('llama', FAST, parse('h100:4'))
    ways = list(every('llama', first))
    assert len(ways) == len(meshes(first)) * 3 * 6  # batches, remat policies
    assert [change for change, _ in guessed] == ways


def test_the_worst_are_among_those_tried(searched):
    _, guessed, picked = searched
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
    assert len({change['mesh'] for change in picked}) >= 4
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


def test_changes_that_keep_the_model_come_before_those_that_do_not(tmp_path):
    large = by_closed_form('llama', {**FAST, 'batch': 1024, 'remat': 'none'}, parse('h100:4'))
    assert not large.fits
    first = next(iter(smaller('llama', large)))
    assert first == {'remat': 'minimal'}
    ways, note = ways_out('llama', large, PlanOptions(topology='h100:4'), tmp_path)
    assert note == ''
    assert 'batch' not in ways[0]['flags']
    assert all(way['fits'] for way in ways)
    # More of what already fits is no other way out.
    knobs = [re.sub(r'=\S+', '', way['flags']) for way in ways]
    assert len(set(knobs)) == len(knobs) == 2


def test_a_knob_that_an_experiment_lacks_is_not_tried():
    found = by_closed_form('mlp', {}, parse('v5e:2x2'))
    assert dataclasses.is_dataclass(found)
    assert all('remat' not in change for change in every('mlp', found))
    assert all('remat' not in change for change in smaller('mlp', found))


@pytest.mark.parametrize(
    ('machine', 'knobs', 'said'),
    [
        ('v5e:2x2', {'size': '405B', 'batch': 4}, 'no slice of v5e does; the smallest v4 that'),
        ('h100:8', {'size': '405B', 'batch': 8}, 'the smallest h100 that holds it: --topology='),
        ('v5p:2x2x1', {'width': 2**17, 'heads': 1024, 'depth': 999, 'batch': 4},
         'nothing larger does, nor a chip with more HBM; try a smaller model'),
    ],
)  # fmt: skip
def test_a_machine_that_holds_it_is_named(machine, knobs, said):
    values = {'scan': True, 'dtype': 'bfloat16', 'mesh': 'fsdp=-1', **knobs}
    found = by_closed_form('llama', values, parse(machine))
    assert not found.fits
    note = larger('llama', found)
    assert said in note
    if named := re.search(r'--topology=(\S+) (.*)', note):
        flags = dict(re.findall(r'--(\w+)=(\S+)', named[2]))
        whole = {**values, **flags, 'batch': int(flags['batch'])}
        assert by_closed_form('llama', whole, parse(named[1])).fits


@pytest.mark.parametrize(('machine', 'impl'), [('v5e:2x2', 'gpu'), ('h100:8', 'tpu')])
def test_kernels_of_another_machine_are_refused(machine, impl):
    chips = {'gpu': 'GPUs', 'tpu': 'TPUs'}[impl]
    with pytest.raises(UsageError) as error:
        by_closed_form('llama', {'attention': impl}, parse(machine))
    assert str(error.value) == (
        f'--attention={impl}: is a kernel for {chips}, and --topology={machine} has none; '
        'try --attention=auto'
    )


def test_an_interrupted_plan_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr('bigjax.plan.plan.assess', interrupted)
    assert run('llama', FAST, PlanOptions(topology='h100:4'), tmp_path) == 130
    assert capsys.readouterr().err == (
        f'\ninterrupted; what was compiled is in {tmp_path}/plan, and the same command goes on '
        'from there\n'
    )


@pytest.mark.parametrize(
    ('knobs', 'told'),
    [({'depth': 9}, True), ({'depth': 9, 'scan': True}, False), ({'depth': 8}, False)],
)
def test_layers_that_are_compiled_one_by_one_are_told(tmp_path, monkeypatch, capsys, knobs, told):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr('bigjax.plan.plan.assess', interrupted)
    monkeypatch.setattr('bigjax.plan.plan.why_closed', lambda *_: '')
    values = {**FAST, 'scan': False, **knobs}
    run('llama', values, PlanOptions(topology='v5e:2x2'), tmp_path)
    said = '--scan=False: 9 layers are compiled one by one' in capsys.readouterr().err
    assert said == told


def way(seconds, memory=1):
    """What arithmetic says of a candidate, on a machine with 10 bytes."""
    return SimpleNamespace(
        closed=SimpleNamespace(predicted_seconds=seconds),
        tokens_per_step=1,
        memory=SimpleNamespace(total=memory),
        topology=SimpleNamespace(hardware=SimpleNamespace(hbm_bytes=10)),
    )


def test_good_ones_and_bad_ones_are_of_different_meshes():
    guessed = [
        ({'mesh': mesh, 'remat': remat}, way(10 * i + j))
        for i, mesh in enumerate('abcde')
        for j, remat in enumerate('xyz')
    ]
    names = [change['mesh'] + change['remat'] for change in searching.chosen(guessed, 6)]
    # The best, the best of other meshes, and where all fit two of the worst.
    assert names == ['ax', 'ay', 'bx', 'cx', 'ez', 'dz']


def test_what_should_fit_and_does_not_is_tried_with_less_memory():
    guessed = [
        ({'mesh': 'a', 'remat': 'x'}, way(1, 12)),  # Nobody thought that it would.
        ({'mesh': 'a', 'remat': 'y'}, way(2, 10.5)),
        ({'mesh': 'a', 'remat': 'z'}, way(4, 5)),
        ({'mesh': 'a', 'remat': 'w'}, way(3, 7)),
        ({'mesh': 'b', 'remat': 'w'}, way(1, 7)),
        ({'mesh': 'a', 'remat': 'v'}, way(1, 10.8)),  # It needs more than what has failed.
    ]
    changes = [change for change, _ in guessed]
    assert searching.instead(changes[0], guessed, changes[:1]) == []
    assert searching.instead(changes[1], guessed, changes[:2]) == [changes[3]]
    assert searching.instead(changes[3], guessed, changes[:2] + changes[3:4]) == [changes[2]]
    assert searching.instead(changes[2], guessed, changes) == []
    assert searching.instead({'mesh': 'c'}, guessed, []) == []


def test_a_search_goes_on_where_the_compiler_has_no_room(tmp_path, monkeypatch, known):
    real, full = searching.assess, []

    def assess(name, values, topology, options, kept):
        found = real(name, values, topology, options, kept)
        if values['remat'] != 'full' and found.fits:  # The compiler finds less room than was said.
            full.append(values)
            large = dataclasses.replace(found.memory, total=2**40)
            return dataclasses.replace(found, memory=large)
        return found

    monkeypatch.setattr(searching, 'assess', assess)
    options = PlanOptions(topology='h100:16', search=True, tries=6)
    rows = searching.search('llama', MODEL, known, options, tmp_path)
    meshes = {values['mesh'] for values in full}
    assert meshes
    assert meshes <= {row['mesh'] for row in rows if row['fits']}


def test_a_mesh_is_traced_once(monkeypatch):
    traced, whole = [], assessing.shapes_on
    monkeypatch.setattr(assessing, 'shapes_on', lambda *given: traced.append(1) or whole(*given))
    found = by_closed_form('llama', {**FAST, 'seq': 1024}, parse('h100:4'))
    ways = [closed('llama', found, change) for change in every('llama', found)]
    assert all(ways)
    assert len(traced) == len(meshes(found)) < len(ways) / 10
