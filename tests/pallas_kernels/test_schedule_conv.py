"""The schedule tool on convolutions: what a case is, what is compiled and how it is told."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels import (
    benchmark,
    schedule,
    schedule_compile,
    schedule_conv,
    schedule_hlo,
    schedule_model,
    schedule_ops,
    schedule_sources,
    schedule_table,
    schedule_table_conv,
)
from pallas_kernels.chip import TPUS, named
from pallas_kernels.conv import wins
from pallas_kernels.schedule_conv import Case
from pallas_kernels.schedule_work import OURS

V6E = named('v6e')
CASES = {
    'strided': Case('conv2d', 2, 9, 8, 6, 3, 2, 4, stride=2, epilogue='bias,gelu'),
    'grouped': Case('conv2d', 2, 7, 7, 8, 3, 3, 4, dilation=2, groups=2, padding='VALID'),
    'padded': Case('conv2d', 1, 5, 6, 3, 3, 3, 4, padding='3,1', epilogue='scale_shift,residual'),
    'causal': Case('conv1d', 2, 1, 12, 4, 1, 3, 4, groups=4, padding='CAUSAL', segments=True),
    'sequence': Case('conv1d', 2, 1, 12, 4, 1, 3, 6, dilation=2, stride=2),
    'gated': Case('gated_conv1d', 2, 1, 12, 4, 1, 2, 6, dilation=3, padding='CAUSAL', skip=5),
}
names = pytest.mark.parametrize('name', CASES)


def built(case: Case, side: str = OURS, **request):
    return schedule_conv.build({'side': side, 'case': dataclasses.asdict(case), **request})


def arrays(specs):
    leaves, tree = jax.tree.flatten(specs)
    found = [
        jnp.asarray(np.random.default_rng(i).normal(size=spec.shape), spec.dtype)
        for i, spec in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, found)


@names
def test_both_sides_compute_the_same(name):
    case = dataclasses.replace(CASES[name], dtype='float32', passes='all')
    ours, specs, _ = built(case, impl='reference')
    theirs, same, _ = built(case, 'xla')
    assert specs == same
    given = arrays(specs)
    found, expected = jax.jit(ours)(*given), jax.jit(theirs)(*given)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected
    )
    y, gradients = jax.eval_shape(ours, *specs)
    y = y if isinstance(y, tuple) else (y,)
    assert [a.shape for a in y] == [a.shape for a in specs[1]]  # those of dy
    (of,) = gradients
    assert {n: a.shape for n, a in of.items()} == {
        n: a.shape for n, a in specs[0].items() if n != 'segment_ids'
    }


@pytest.mark.parametrize('passes', ['input', 'weight'])
def test_one_gradient_alone_is_that_of_all(passes):
    case = dataclasses.replace(CASES['strided'], dtype='float32', passes='all')
    function, specs, _ = built(case, impl='reference')
    given = arrays(specs)
    (every,) = jax.jit(function)(*given)[1]
    alone, same, _ = built(dataclasses.replace(case, passes=passes), impl='reference')
    assert specs == same
    (found,) = jax.jit(alone)(*given)
    assert list(found) == [passes[0].replace('i', 'x')]
    for key, value in found.items():
        np.testing.assert_allclose(value, every[key], rtol=1e-6)


@names
def test_the_work_is_that_of_every_tap_and_array(name):
    case = CASES[name]
    specs = built(case)[1]
    results = jax.eval_shape(built(case, 'xla')[0], *specs)
    read = [(math.prod(a.shape), a.dtype.itemsize) for a in jax.tree.leaves(specs)]
    written = [(math.prod(a.shape), a.dtype.itemsize) for a in jax.tree.leaves(results)]
    least = schedule_conv.work(case, V6E)
    assert least.hbm_bytes == sum(n * size for n, size in read + written)
    w = case.shapes['w']
    P, Q = case.out_size
    products = 2 * case.batch * P * Q * math.prod(w)
    if case.op == 'gated_conv1d':
        products += 2 * case.batch * Q * (3 * 4 + 3 * 5)
    assert least.flops == products
    both = schedule_conv.work(dataclasses.replace(case, passes='all'), V6E)
    assert both.flops == 3 * least.flops
    # Both gradients of everything are written once more, and dy is read.
    assert both.hbm_bytes > 2 * least.hbm_bytes
    one = schedule_conv.work(dataclasses.replace(case, passes='input'), V6E)
    assert one.hbm_bytes <= least.hbm_bytes


MODULE = """\
HloModule looped

%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[], f32[8,128]{1,0}) parameter(0)
  %x = f32[8,128]{1,0} get-tuple-element(%p), index=1
  %inner = f32[8,128]{1,0} fusion(%x), kind=kLoop, calls=%c, backend_config={"estimated_cycles":"100"}
}

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %outer = f32[8,128]{1,0} fusion(%a), kind=kLoop, calls=%c, backend_config={"estimated_cycles":"7"}
  %loop = (s32[], f32[8,128]{1,0}) while(%t), condition=%k, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %copy = f32[8,128]{1,0} copy(%outer)
}
"""  # noqa: E501


def _prediction(text: str, case) -> schedule_model.Prediction:
    compiled = schedule_compile.Compiled(text, 0, 0.0, {}, {})
    parts = tuple(schedule_model.parts_of(compiled, V6E))
    least = schedule_ops.module(case.op).work(case, V6E)
    return schedule_model.Prediction(case, V6E, least, parts, 0, 0.0, {})


def test_the_compiler_s_estimates_are_summed_with_loops_by_their_trips():
    found = schedule_hlo.instructions(MODULE)
    assert (found['loop'].body, found['loop'].trips) == ('body', 5)
    assert found['copy'].cycles is None
    predicted = _prediction(MODULE, CASES['grouped'])
    assert predicted.estimate_seconds == pytest.approx((7 + 5 * 100) / V6E.clock_hz)
    (inner,) = [part for part in predicted.parts if part.name == 'inner']
    assert inner.times == 5
    assert inner.hbm_bytes == 5 * 2 * 8 * 128 * 4


def test_a_convolution_takes_the_larger_figure_and_a_prefetch_counts_as_traffic():
    case = CASES['grouped']
    predicted = _prediction(MODULE.replace('"100"', '"1000000"'), case)
    assert predicted.seconds == predicted.estimate_seconds > predicted.model_seconds
    assert predicted.as_json()['times_roofline'] > 1
    small = _prediction(MODULE.replace('"100"', '"1"'), case)
    assert small.seconds == small.model_seconds > small.estimate_seconds
    big = 'f32[8192,4096]{1,0}'
    start = f'  %s = ({big}, {big}, u32[]{{:S(2)}}) copy-start(%a)\n'
    beside = _prediction(MODULE.replace('  ROOT', start + '  ROOT'), case)
    size = 4 * 8192 * 4096
    assert beside.model_seconds == pytest.approx(
        (size + sum(p.hbm_bytes for p in small.parts)) / V6E.hbm_bytes_per_s / 0.97
    )


def test_dumps_are_named_by_the_sources_that_they_depend_on():
    def files(op, case):
        return {
            str(path.relative_to(schedule_sources.ROOT)) for path in schedule_sources.of(op, case)
        }

    grouped = files('conv2d', dataclasses.asdict(CASES['grouped']))
    assert {'conv/tpu/grouped.py', 'conv/tpu/layout.py', 'chip.py'} <= grouped
    assert not [name for name in grouped if 'depthwise' in name or 'gpu' in name or 'xla' in name]
    gated = files('gated_conv1d', dataclasses.asdict(CASES['gated']))
    assert 'conv/tpu/gated_forward.py' in gated
    assert 'conv/tpu/grouped.py' not in gated
    forward, both = (files('attention', {'backward': backward}) for backward in (False, True))
    assert forward < both
    assert {name for name in both - forward if 'backward' not in name} == set()


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--op=conv2d', '--input=1,2,3'], '--input must be B,H,W,C'),
        (['--op=conv1d', '--input=1,2,4', '--kernel=3'], '--kernel must be taps,features'),
        (['--op=conv2d', '--input=1,4,4,6', '--kernel=3,3,6', '--groups=4'], '--groups=4 must div'),
        (['--op=conv2d', '--input=1,4,4,6', '--kernel=3,3,6', '--padding=1'], 'before,after'),
        (['--op=conv2d', '--input=1,4,4,6', '--kernel=3,3,6', '--epilogue=selu'], 'not selu'),
        (['--op=conv2d', '--input=1,4,4,6', '--kernel=3,3,6', '--against=splash'], 'with xla'),
    ],
)
def test_bad_flags_are_explained(flags, message):
    with pytest.raises(SystemExit, match=message):
        schedule.main(flags)


def test_the_table_has_the_rows_asked_for_and_both_of_xla_s_figures():
    rows = schedule_table_conv.rows()
    forward = [row for row in rows if row[2].passes == 'forward']
    assert len(rows) == 2 * len(forward)
    for (name, goal, case), (same, wider, both) in zip(forward, rows[len(forward) :], strict=True):
        assert name == same
        assert both == dataclasses.replace(case, passes='all')
        assert wider == (goal and 1.5 * goal)
    here = {
        'predicted_seconds': 3e-4, 'utilization': {'MATMUL': 0.9, 'VALU': 0.5},
        'total_bundles': 75, 'stall_cycles': 25,
    }  # fmt: skip
    xla = {'model_seconds': 4e-4, 'estimate_seconds': 6e-4, 'predicted_seconds': 6e-4}
    columns = schedule_table_conv.HEAD.splitlines()[-1].count('|')
    for chip in TPUS:
        for name, goal, case in rows:
            only = {'xla': dict.fromkeys(xla, 5e-4)}
            found = {'free': {'here': here, 'xla': xla}, 'default': only}
            if case.op != 'conv2d':  # sequences are compared with the default layouts
                found = {'free': only, 'default': {'here': here, 'xla': xla}}
            line = schedule_table_conv.row(name, goal, case, chip, found)
            assert line.count('|') == columns
            assert '**0.75**' in line  # of the smaller one
            assert '400 (' in line
            assert '600 (' in line
            roofline = schedule_conv.work(case, named(chip)).roofline_seconds(named(chip))
            missed = goal is not None and goal * roofline < 3e-4
            assert line.endswith('| products 90%, HBM 25% |' if missed else '|  |')


def test_a_table_is_written_between_its_own_marks(tmp_path, monkeypatch):
    readme = tmp_path / 'README.md'
    marks = [mark for pair in schedule_table.MARKS.values() for mark in pair]
    readme.write_text('a\n' + '\nb\n'.join(marks) + '\nc\n')
    monkeypatch.setattr(schedule_table, 'README', readme)
    schedule_table.write('THE TABLE', 'conv')
    begin, end = schedule_table.MARKS['conv']
    text = readme.read_text()
    assert f'{begin}\nTHE TABLE\n{end}\nc\n' in text
    assert text.replace('THE TABLE', 'b') == 'a\n' + '\nb\n'.join(marks) + '\nc\n'
    readme.write_text('nothing')
    with pytest.raises(SystemExit, match='convolution table: begin'):
        schedule_table.write('THE TABLE', 'conv')


def test_the_benchmark_runs_on_what_is_there(capsys):
    flags = ['--op=conv1d', '--input=1,16,8', '--kernel=4,8', '--groups=8', '--repeats=1']
    benchmark.main(flags)
    assert 'forward bfloat16' in capsys.readouterr().out


def _taken(case: Case, chip: str) -> bool:
    return wins.wins(*schedule_conv.operands(case), named(chip))


GROUPED = Case('conv2d', 32, 56, 56, 256, 3, 3, 256, groups=32)


def test_a_kernel_is_taken_where_it_is_predicted_to_win_and_nowhere_else(monkeypatch):
    monkeypatch.setattr(wins, 'RATIOS', {'grouped': {'v6e': 0.9, 'v5e': 1.0}})
    assert _taken(GROUPED, 'v6e')
    for chip in ('v5e', 'v5p', 'h100'):  # no faster, not known, not predicted
        assert not _taken(GROUPED, chip)
    for change in (
        {'dtype': 'float32'},
        {'batch': 1},  # most of a tile would be padding
        {'rows': 4, 'cols': 4},  # too small to tell
        {'groups': 8},  # XLA wastes less
        {'groups': 1},  # another kind
    ):
        assert not _taken(dataclasses.replace(GROUPED, **change), 'v6e'), change


def test_a_depthwise_kernel_is_taken_for_many_taps():
    wide = Case('conv2d', 128, 14, 14, 384, 7, 7, 384, groups=384)
    for chip in TPUS:
        assert _taken(wide, chip)
        assert not _taken(dataclasses.replace(wide, kernel_rows=3, kernel_cols=3), chip)


def test_a_stem_is_left_to_xla_which_needs_no_copies_around_it():
    for chip in TPUS:
        assert not _taken(Case('conv2d', 32, 224, 224, 3, 7, 7, 64, stride=2), chip)


def test_on_hopper_the_memory_s_convolutions_are_taken_and_dense_ones_left_to_cudnn():
    assert _taken(dataclasses.replace(GROUPED, groups=256), 'h100')
    assert not _taken(dataclasses.replace(GROUPED, groups=1), 'h100')


def test_the_table_takes_what_its_figures_say():
    text = schedule_table.README.read_text()
    begin, end = (text.find(mark) for mark in schedule_table.MARKS['conv'])
    lines = [line for line in text[begin:end].splitlines() if line.startswith('| v')]
    ratios: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        cells = [cell.strip(' *') for cell in line.strip('|').split('|')]
        chip, name, ratio, taken = cells[0], cells[1], cells[7], cells[10]
        if ratio != '–':
            ratios.setdefault((chip, name, taken), []).append(float(ratio))
    for (chip, name, taken), found in ratios.items():
        assert taken == 'xla' or max(found) < 1, (chip, name)
    cases = {name: case for name, _, case in schedule_table_conv.rows()}
    for chip, name, taken in ratios:
        assert taken == schedule_table_conv.taken(cases[name], chip), (chip, name)


@pytest.mark.slow
def test_a_convolution_is_compiled_on_both_sides(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    flags = ['--op=conv2d', '--chip=v5e', '--input=8,8,8,128', '--kernel=3,3,128', '--against=xla']
    schedule.main([*flags, '--json'])
    result = json.loads(capsys.readouterr().out)
    for side in (result, result['rivals']['xla']):
        assert side['predicted_seconds'] >= max(side['model_seconds'], side['estimate_seconds'])
        assert side['times_roofline'] > 1
    assert result['steps'] > 0
    assert not result['rivals']['xla']['kernels']
    assert result['rivals']['xla']['estimate_seconds'] > 0
    assert result['rivals']['xla']['ratio'] > 0


def test_the_kernel_s_padding_is_lax_s():
    for name in ('strided', 'sequence'):
        case = CASES[name]
        spans = [(k - 1) * case.dilation + 1 for k in (case.kernel_rows, case.kernel_cols)]
        sizes = (case.rows, case.cols)
        strides = (1 if case.op == 'conv1d' else case.stride, case.stride)
        assert list(case.pads) == list(lax.padtype_to_pads(sizes, spans, strides, 'SAME'))
