"""The schedule tool: reading bundles, following them, and the one rule that both sides obey."""

import dataclasses
import json
import pathlib

import pytest

from pallas_kernels import (
    schedule,
    schedule_attention,
    schedule_calibration,
    schedule_compile,
    schedule_hlo,
    schedule_model,
    schedule_program,
    schedule_rivals,
    schedule_run,
    schedule_table,
)
from pallas_kernels.chip import TPUS, named
from pallas_kernels.schedule_attention import Case

V6E = named('v6e')
DATA = pathlib.Path(__file__).parents[1] / 'data'

# A kernel as the compiler prints it, by hand: six turns of a loop; the region of the matmuls runs
# where the operand in scalar memory says so, an epilogue in the last turn, a slow path if a value
# that came from the vector unit is positive.
BUNDLES = (DATA / 'schedule_bundles.txt').read_text()
MATMUL, LAST_BUNDLE = 0xB, 0x1A


def _utilization(bundles: int = LAST_BUNDLE + 1) -> str:
    rows = [[0] * len(schedule_program.UNITS) for _ in range(bundles)]
    for row in rows[MATMUL : MATMUL + 1]:
        row[0] = 2
    return '\n'.join(
        [
            '== CAPACTIY:',
            ', '.join(schedule_program.UNITS),
            ' '.join('2' for _ in schedule_program.UNITS),
            '== UTILIZATION:',
            *(' '.join(map(str, row)) for row in rows),
        ]
    )


def _run(values, chip=V6E, **options):
    program = schedule_program.parse(BUNDLES, _utilization())
    return schedule_run.run(program, chip, values, **options)


def test_only_the_regions_that_run_are_counted():
    run = _run({0: (1, 0, 1, 0, 0, 1)})
    assert (run.iterations, run.steps) == (6, 3)
    # Before the loop 4; a turn has 2 + 2 + 2 (loop top), 3 (after the matmuls), 3, 4 and, where
    # they run, 3 bundles of matmuls and 1 of the epilogue.
    assert run.bundles == 4 + 6 * (6 + 3 + 3 + 4) + 3 * 3 + 1 + 1
    assert run.busy[0] == 2 * 3
    assert not run.assumed
    assert _run({0: (0,) * 6}).steps == 0


def test_a_path_that_depends_on_data_is_reported_and_left_out():
    run = _run({0: (1,) * 6})
    assert run.skipped == ((0x10, 2),)
    assert 0x10 not in [start for start, _, _ in run.profile]


def test_a_path_that_depends_on_data_is_gone_through_where_that_is_asked_for():
    left_out, run = (_run({0: (1,) * 6}, slow_paths=slow) for slow in (False, True))
    assert not run.skipped
    assert (0x10, 2, 6) in run.profile
    assert run.bundles == left_out.bundles + 6 * 2


def test_an_operand_that_nobody_states_is_reported():
    assert _run({}).assumed == (0,)


def test_scalars_are_fetched_from_hbm_as_from_vmem():
    # The address of an operand in HBM is not shifted.
    text = BUNDLES.replace('dma.vmem_to_smem /*vmem=*/%s13_s2', 'dma.hbm_to_smem /*hbm=*/%s10_s0')
    assert text != BUNDLES
    program = schedule_program.parse(text, _utilization())
    values = {0: (1, 0, 1, 0, 0, 1)}
    assert schedule_run.run(program, V6E, values).bundles == _run(values).bundles
    assert schedule_run.run(program, V6E, {}).assumed == (0,)


def test_copies_take_the_memory_s_time_and_waits_are_counted():
    run = _run({0: (1,) * 6})
    assert run.hbm_bytes == 6 * 128 * 32
    assert run.stalls > 0
    slow = dataclasses.replace(V6E, hbm_bytes_per_s=V6E.hbm_bytes_per_s / 1000)
    assert _run({0: (1,) * 6}, slow).cycles > 2 * run.cycles
    assert run.cycles == pytest.approx(run.bundles + run.stalls)


def test_a_dump_of_another_form_is_refused():
    with pytest.raises(ValueError, match='utilisation'):
        schedule_program.parse(BUNDLES, 'nothing')
    with pytest.raises(ValueError, match='bundles'):
        schedule_program.parse(BUNDLES, _utilization(3))
    with pytest.raises(ValueError, match='no bundles'):
        schedule_program.parse('', _utilization())
    endless = BUNDLES.replace('scmp.lt.s32.totalorder %s36_s4, 6', 'scmp.lt.s32.totalorder 0, 6')
    program = schedule_program.parse(endless, _utilization())
    with pytest.raises(ValueError, match='did not end'):
        schedule_run.run(program, V6E, {}, most_blocks=1000)


def test_scalar_arithmetic_is_32_bits_wide_and_passes_the_unknown_on():
    f = schedule_program.schedule_arithmetic.FUNCTIONS
    assert f['add'](2**31 - 1, 1) == -(2**31)
    assert f['shr'](-1, 28) == 15
    assert f['mulhi'](2863311531, 9) == 6  # 9 / 3 * 2: how a compiler divides by three
    assert f['add'](None, 1) is None
    assert f['nand'](None, False) is True
    assert f['disj'](None, True) is True
    assert f['disj'](None, False) is None
    assert f['select'](None, 3, 3) == 3


MODULE = (DATA / 'schedule_module.txt').read_text()


def test_a_module_s_kernels_bytes_and_constants():
    found = schedule_hlo.instructions(MODULE)
    assert 'not_of_the_entry' not in found
    kernel = found['kernel.1']
    assert kernel.kernel
    assert kernel.vmem_bytes == 4096
    assert found['copy'].hbm_bytes == 8 * 128 * 2  # read from HBM, written to VMEM
    assert not found['copy'].kernel
    values = schedule_hlo.values(found, kernel)
    # int8 rows share words: row 0 has the low byte, row 1 the next.
    assert values == {0: (0, 1, 1), 1: (1 + (2 << 8), 0 + (1 << 8)), 2: (7, 7, 7, 7)}
    # What is broadcast, too: the mask of blocks of a published kernel that sees all of them.
    lines = '  %two = s8[] constant(2)\n  %all = s8[1,2,2]{2,1,0} broadcast(%two), dimensions={}\n'
    head, _, tail = MODULE.partition('\nENTRY ')
    first, _, rest = tail.partition('\n')
    found = schedule_hlo.instructions(f'{head}\nENTRY {first}\n{lines}{rest}')
    passed = dataclasses.replace(found['kernel.1'], operands=('all',))
    assert schedule_hlo.values(found, passed) == {0: (2 + (2 << 8), 2 + (2 << 8))}
    with pytest.raises(ValueError, match='ENTRY'):
        schedule_hlo.instructions('HloModule nothing')


def test_equal_kernels_have_the_dumps_of_one():
    found = schedule_hlo.instructions(MODULE)
    kernel = found['kernel.1']
    twin = dataclasses.replace(kernel, name='kernel.2')
    other = dataclasses.replace(kernel, name='kernel.3', hbm_bytes=kernel.hbm_bytes + 1)
    found |= {one.name: one for one in (twin, other)}
    for one, name in ((kernel, 'kernel.1'), (twin, 'kernel.1'), (other, 'kernel.3')):
        assert schedule_hlo.dumped_as(one, found, ['copy', 'kernel.1']) == name
    assert schedule_hlo.dumped_as(found['copy'], found, ['kernel.1']) == 'copy'


@pytest.mark.parametrize('chip', TPUS)
@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('dim', [64, 128, 256])
def test_the_floor_is_the_arithmetic_with_padded_contractions(chip, causal, dim):
    chip = named(chip)
    case = Case(2, 512, 4, 4, dim, causal)
    least = schedule_attention.work(case, chip)
    pairs = sum(t + 1 if causal else 512 for t in range(512)) * 8
    assert least.flops == 4 * pairs * dim
    assert least.mxu_flops >= least.flops
    # A head as wide as the unit wastes nothing.
    assert (least.mxu_flops == least.flops) == (dim % chip.mxu == 0)
    backward = schedule_attention.work(dataclasses.replace(case, backward=True), chip)
    assert backward.flops == 3.5 * least.flops


def test_pairs_of_a_window_are_those_counted_one_by_one():
    for causal in (False, True):
        for window in (0, 3, 100):
            case = Case(1, 16, 1, 1, 8, causal, window)
            seen = sum(
                t - window <= s <= t + (0 if causal else window)
                for t in range(16)
                for s in range(16)
            )
            assert case.pairs == seen


def _prediction(kernel_seconds: float) -> schedule_model.Prediction:
    case = Case(1, 1024, 1, 1, 128)
    parts = [
        schedule_model.Part('kernel', True, kernel_seconds, 0, 0, None, {}, 0),
        schedule_model.Part('copy', False, 1e-6, 0, 0, None, {}, 0),
    ]
    least = schedule_attention.work(case, V6E)
    return schedule_model.Prediction(case, V6E, least, tuple(parts), 0, 0.0, {})


def test_no_side_is_predicted_below_the_floor_and_transposes_count():
    floor = _prediction(0.0).floor_seconds
    assert _prediction(0.0).seconds == pytest.approx(floor + 1e-6)
    assert _prediction(2 * floor).seconds == pytest.approx(2 * floor + 1e-6)


def test_a_rival_that_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setattr(schedule_rivals.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(schedule_compile.CompileError, match='pip install tokamax'):
        schedule_rivals.configs('tokamax', Case(1, 1024, 1, 1, 128), 'v6e')


def test_a_missing_compiler_says_what_to_install(monkeypatch):
    def missing(name):
        raise schedule_compile.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(schedule_compile.importlib.metadata, 'version', missing)
    with pytest.raises(schedule_compile.CompileError, match='pip install libtpu'):
        schedule_compile.version_warning()
    monkeypatch.setattr(schedule_compile.importlib.metadata, 'version', lambda name: '0.1')
    assert schedule_compile.LIBTPU in schedule_compile.version_warning()


def test_missing_dumps_and_refusals_of_the_compiler_are_said(tmp_path):
    facts = {'temp_bytes': 0, 'seconds': 0, 'notes': {}}
    (tmp_path / 'facts.json').write_text(json.dumps(facts))
    (tmp_path / 'module.txt').write_text(MODULE)
    with pytest.raises(schedule_compile.CompileError, match=r'no bundles.*flags have changed'):
        schedule_compile.read(tmp_path)
    (tmp_path / '1-kernel.1-7-final_bundles.txt').write_text(BUNDLES)
    (tmp_path / '1-kernel.1-7-schedule-analysis_final_bundles.txt').write_text('')
    (tmp_path / f'1-kernel.1-6-{schedule_compile._SLOTS}').write_text(_utilization())
    assert set(schedule_compile.read(tmp_path).dumps) == {'kernel.1'}
    reason = schedule_compile._reason('Traceback\nValueError: block_sizes.q is odd\n----\n')
    (tmp_path / 'facts.json').write_text(json.dumps({'error': reason}))
    with pytest.raises(schedule_compile.CompileError, match=r'^ValueError: block_sizes\.q is odd$'):
        schedule_compile.read(tmp_path)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--shape=1,2,3'], 'B,T,H,K,D'),
        (['--shape=1,128,1,1,128', '--against=other'], 'tokamax'),
        (['--shape=1,128,1,1,128', '--backward_block_sizes=1,1,1,1'], 'needs --block_sizes'),
    ],
)
def test_bad_flags_are_explained(flags, message):
    with pytest.raises(SystemExit, match=message):
        schedule.main(flags)


def test_the_table_has_a_row_and_a_goal_for_every_case_asked_for():
    asked = schedule_table.cases()
    assert len(set(asked)) == len(asked)
    assert {case.head_dim for case in asked} == {64, 128, 256}
    result = {'predicted_seconds': 1e-3, 'kernel_seconds': 1e-3, 'fraction_of_peak': 0.5}
    rival = {'predicted_seconds': 2e-3, 'kernel_seconds': 1.5e-3, 'ratio': 0.5}
    result['rivals'] = {'tokamax': rival, 'splash': {'error': 'refused'}}
    for chip in TPUS:
        for case in asked:
            line = schedule_table.row(case, chip, result)
            assert line.count('|') == schedule_table.HEAD.splitlines()[-1].count('|')
            assert '**0.50** | 0.67' in line


def test_the_calibration_states_what_its_rows_say():
    rows = schedule_calibration.rows()
    text = schedule_calibration.summary()
    for row in rows:
        assert 0.5 < row['predicted'] / row['published'] < 1.5
        assert row['chip'] in text


@pytest.mark.slow
def test_a_kernel_is_compiled_and_followed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(schedule_compile, '_key', lambda request: request['side'])
    flags = ['--chip=v5e', '--shape=1,256,1,1,128', '--json']
    schedule.main(flags)
    result = json.loads(capsys.readouterr().out)
    for name in ('predicted_seconds', 'bundles', 'steps', 'vmem_bytes', 'hbm_bytes'):
        assert result[name] > 0
    assert result['spills'] >= 0
    assert 0 < result['fraction_of_peak'] < 1
    assert result['times_roofline'] > 1
    assert result['vmem_bytes'] < named('v5e').vmem_limit
    assert not [note for note in result['notes'] if 'zeros' in note]
    monkeypatch.setattr(schedule_compile, 'run', None)  # what was compiled is kept
    assert len(list(tmp_path.rglob('*.zip'))) == 1
    schedule.main(flags)
    assert json.loads(capsys.readouterr().out)['steps'] == result['steps']
