"""Reading compiled programs: instructions, trip counts, arithmetic."""

import json
import math
from pathlib import Path

import pytest

from bigjax.plan.program import flops, hlo, loops, traffic

DATA = Path(__file__).parent / 'data'

# What a compiler writes: nested layouts, comments in lists, strings with brackets, statements over
# several lines, lines that hold only braces.
TEXT = r"""HloModule jit_f, is_scheduled=true, num_partitions=8, entry={(f32[2]{0})->f32[2]{0}}

FileNames
1 "a.py"

%inner (p.1: bf16[8,128]) -> bf16[8,128] {
  %p.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %n.1 = bf16[8,128]{1,0:T(8,128)(2,1)} negate(%p.1)
}

ENTRY %main (x.1: bf16[8,128], y: s32[]) -> (bf16[8,128], f32[2,3]) {
  %x.1 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="x[\'a{\']"}
  %y = s32[]{:T(128)} parameter(1)
  %k.1 = (bf16[8,128]{1,0}, f32[2,3]{1,0:T(1,128)S(1)}, /*index=2*/u32[]{:S(2)}) custom-call(%x.1,
/*index=1*/%y), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\"block_q\": 512, \"open\": \"{(\"}"
}}, metadata={op_name="jit(f)/kernel/pallas_call" stack_frame_id=4}, backend_config={
"estimated_cycles":"7","body":"} {(["}, said="over
two lines"
  %f.1 = bf16[8,128]{1,0} fusion(%x.1
), kind=kLoop, calls=%inner, backend_config={"window_config":{"estimated_cycles":"1234"}}
  %g.1 = f32[2,3]{1,0} get-tuple-element(%k.1), index=1
  ROOT %t.1 = (bf16[8,128]{1,0}, f32[2,3]{1,0}) tuple(%f.1, %g.1)
}
"""


def test_parse_reads_statements_that_nest_and_go_on() -> None:
    module = hlo.parse(TEXT)
    assert module.partitions == 8
    assert list(module.computations) == ['inner', 'main']
    main = module.entry
    assert list(main.instructions) == ['x.1', 'y', 'k.1', 'f.1', 'g.1', 't.1']
    kernel = main.instructions['k.1']
    assert kernel.operands == ('x.1', 'y')
    assert kernel.target == 'tpu_custom_call'
    assert kernel.op_name == 'jit(f)/kernel/pallas_call'
    assert kernel.cycles == 7
    assert kernel.arrays == (
        hlo.Array('bf16', (8, 128)), hlo.Array('f32', (2, 3), 1), hlo.Array('u32', (), 2),
    )  # fmt: skip
    assert kernel.bytes == 8 * 128 * 2 + 24 + 4
    assert main.instructions['f.1'].cycles == 1234
    assert main.instructions['x.1'].cycles is None
    assert main.instructions['x.1'].op_name == r'x[\'a{\']'
    assert main.parameters[1].name == 'y'
    assert main.root.name == 't.1'
    assert [c.name for c in module.called(main.instructions['f.1'])] == ['inner']
    assert module.computations['inner'].instructions['p.1'].arrays[0].space == 1


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('HloModule a\n', 'no ENTRY'),
        ('ENTRY %m () -> () {\n  %a = f32[] add(%b, %c\n}\n', 'ends inside of computation m'),
        ('ENTRY %m () -> () {\n  what is this\n}\n', 'no instruction'),
        ('ENTRY %m () -> () {\n  %a = f32[2]{0}\n}\n', 'no operation'),
    ],
    ids=['empty', 'open', 'words', 'half'],
)
def test_parse_loses_nothing_silently(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hlo.parse(text)


@pytest.mark.parametrize('name', ['llama_v5e', 'llama_v5p'])
def test_every_line_of_a_program_is_an_instruction(name: str) -> None:
    text = (DATA / f'{name}.hlo').read_text()
    module = hlo.parse(text)
    lines = [line for line in text.splitlines() if line.startswith('  ')]
    assert sum(len(c.instructions) for c in module.computations.values()) == len(lines)


@pytest.mark.parametrize(
    ('dtype', 'dims', 'expected'),
    [
        ('pred', (3,), 3),
        ('bf16', (2, 5), 20),
        ('f8e4m3fn', (8,), 8),
        ('s4', (6,), 3),
        ('token', (), 0),
    ],
)
def test_bytes_of_arrays(dtype: str, dims: tuple[int, ...], expected: int) -> None:
    assert hlo.Array(dtype, dims).bytes == expected


# ---- Arithmetic ----


def program(*lines: str, before: str = '') -> hlo.Module:
    return hlo.parse(
        f'{before}\nENTRY %m () -> () {{\n' + '\n'.join(f'  {x}' for x in lines) + '\n}'
    )


@pytest.mark.parametrize(
    ('lhs', 'rhs', 'out', 'labels', 'window', 'expected'),
    [
        ('64,32', '32,16', '64,16', 'bf_io->bf', '', 2 * 64 * 32 * 16),
        # A window as long as what it slides along is a sum over it, too.
        ('4,64,32', '4,32,16', '64,16,1', '0bf_0io->bf0', 'size=4', 2 * 4 * 64 * 32 * 16),
        # Two shards side by side, of which each tap meets one: no pair is counted twice.
        ('8,32,1', '16,2,32', '8,2,16', 'bf0_o0i->b0f', 'size=2 pad=1_1 rhs_reversal=1',
         2 * 8 * 32 * 16 * 2),
        # A batch of 8 as a window that a dilated operand slides under.
        ('8,64,32', '8,32,16', '8,64,16', '0bf_0io->0bf', 'size=8 stride=7 lhs_dilate=8',
         2 * 8 * 64 * 32 * 16),
        # 3 x 3 taps over 5 x 5 with a margin of zeros: 13 of 15 pairs along each side.
        ('2,5,5,4', '3,3,4,6', '2,5,5,6', 'b01f_01io->b01f', 'size=3x3 pad=1_1x1_1',
         2 * 2 * 4 * 6 * 13 * 13),
        # Every second place, and taps two apart.
        ('1,9,4', '3,4,6', '1,5,6', 'b0f_0io->b0f', 'size=3 stride=2 pad=2_2 rhs_dilate=2',
         2 * 4 * 6 * 13),
    ],
    ids=['matrices', 'sum', 'shards', 'batch', 'margin', 'dilated'],
)  # fmt: skip
def test_flops_count_pairs_that_exist(lhs, rhs, out, labels, window, expected) -> None:
    window = f', window={{{window}}}' if window else ''
    module = program(
        f'%a = bf16[{lhs}] parameter(0)',
        f'%b = bf16[{rhs}] parameter(1)',
        f'ROOT %c = bf16[{out}] convolution(%a, %b){window}, dim_labels={labels}',
    )
    found = flops.products(module, module.entry, module.entry.root)
    assert [product.flops for product in found] == [expected]


def test_precision_of_float32_takes_more_passes() -> None:
    lines = (
        '%a = f32[64,32] parameter(0)',
        '%b = f32[32,16] parameter(1)',
        'ROOT %c = f32[64,16] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}',
    )
    plain = program(*lines)
    exact = program(*lines[:2], lines[2] + ', operand_precision={highest,highest}')
    one, six = (flops.product(m.entry, m.entry.root) for m in (plain, exact))
    assert (one.flops, one.passes, six.passes) == (2 * 64 * 32 * 16, 1, 6)


# ---- Loops ----

LOOP = """
%body () -> () {{
  %p = (s32[], f32[4], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4] get-tuple-element(%p), index=1
  %n = s32[] get-tuple-element(%p), index=2
  %by = s32[] constant({by})
  %next = s32[] add(%i, %by)
  ROOT %t = (s32[], f32[4], s32[]) tuple(%next, %x, %n)
}}
%condition () -> () {{
  %p = (s32[], f32[4], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] {limit}
  ROOT %c = pred[] compare(%i, %n), direction={direction}
}}
"""


def trips(start: str, limit: str, by: int, direction: str, config: str = '') -> int | None:
    module = program(
        f'%first = s32[] {start}',
        '%x = f32[4] parameter(0)',
        '%last = s32[] constant(7)',
        '%t = (s32[], f32[4], s32[]) tuple(%first, %x, %last)',
        f'ROOT %w = (s32[], f32[4], s32[]) while(%t), condition=%condition, body=%body{config}',
        before=LOOP.format(by=by, limit=limit, direction=direction),
    )
    return loops.trips(module, module.entry, module.entry.root)


@pytest.mark.parametrize(
    ('start', 'limit', 'by', 'direction', 'expected'),
    [
        ('constant(0)', 'constant(8)', 1, 'LT', 8),
        ('constant(0)', 'constant(8)', 2, 'LT', 4),  # unrolled
        ('constant(1)', 'constant(8)', 2, 'LT', 4),
        ('constant(0)', 'constant(8)', 3, 'LE', 3),
        ('constant(5)', 'constant(0)', -1, 'GE', 6),
        ('constant(0)', 'get-tuple-element(%p), index=2', 1, 'NE', 7),  # carried, never changed
        ('constant(9)', 'constant(8)', 1, 'LT', 0),
        ('parameter(1)', 'constant(8)', 1, 'LT', None),  # depends on data
    ],
)
def test_trips(start: str, limit: str, by: int, direction: str, expected: int | None) -> None:
    assert trips(start, limit, by, direction) == expected


NESTED = """
%inner_body () -> () {{
  %p = (s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%p), index=0
  %m = s32[] get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %k = s32[] subtract(%j, %one)
  ROOT %t = (s32[], s32[]) tuple(%k, %m)
}}
%inner_condition () -> () {{
  %p = (s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%p), index=0
  %m = s32[] get-tuple-element(%p), index=1
  ROOT %c = pred[] compare(%m, %j), direction=LT
}}
%body () -> () {{
  %p = (s32[], s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %five = s32[] get-tuple-element(%p), index=1
  %one = s32[] get-tuple-element(%p), index=2
  %u = (s32[], s32[]) tuple(%five, %{last})
  %w = (s32[], s32[]) while(%u), condition=%inner_condition, body=%inner_body
  %n = s32[] add(%i, %one)
  ROOT %t = (s32[], s32[], s32[]) tuple(%n, %five, %one)
}}
%condition () -> () {{
  %p = (s32[], s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(3)
  ROOT %c = pred[] compare(%i, %n), direction=LT
}}
"""


@pytest.mark.parametrize(('last', 'expected'), [('one', 4), ('i', None)])
def test_trips_of_a_loop_in_a_loop(last: str, expected: int | None) -> None:
    """What the outer loop carries and never changes is known inside; its counter is not."""
    module = program(
        '%zero = s32[] constant(0)',
        '%five = s32[] constant(5)',
        '%one = s32[] constant(1)',
        '%t = (s32[], s32[], s32[]) tuple(%zero, %five, %one)',
        'ROOT %w = (s32[], s32[], s32[]) while(%t), condition=%condition, body=%body',
        before=NESTED.format(last=last),
    )
    outer, body = module.entry.root, module.computations['body']
    assert loops.trips(module, module.entry, outer) == 3
    first = loops.initial(module, module.entry, outer, lambda _: None)
    carried = loops.invariant(module, outer, first)
    assert loops.trips(module, body, body.instructions['w'], carried) == expected


def test_trips_that_the_program_states_serve_where_nothing_else_does() -> None:
    stated = ', backend_config={"known_trip_count":{"n":"12"}}'
    assert trips('parameter(1)', 'constant(8)', 1, 'LT', stated) == 12
    assert trips('constant(0)', 'constant(8)', 1, 'LT', stated) == 8


# ---- Traffic ----


def test_traffic_counts_slices_not_what_they_are_cut_from() -> None:
    before = """
%cut () -> () {
  %p = f32[10,100] parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %s = f32[1,100] dynamic-slice(%p, %i, %z), dynamic_slice_sizes={1,100}
  ROOT %n = f32[1,100]{:S(1)} negate(%s)
}
%put () -> () {
  %p = f32[10,100] parameter(0)
  %u = f32[1,100] parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  ROOT %d = f32[10,100] dynamic-update-slice(%p, %u, %i, %z)
}
"""
    module = program(
        '%a = f32[10,100] parameter(0)',
        '%i = s32[]{:S(6)} parameter(1)',
        '%x = f32[1,100]{:S(1)} fusion(%a, %i), kind=kLoop, calls=%cut',
        '%y = f32[1,100] negate(%x)',
        'ROOT %z = f32[10,100] fusion(%a, %y, %i), kind=kLoop, calls=%put',
        before=before,
    )
    moved = {
        name: traffic.traffic(module, module.entry, found)
        for name, found in module.entry.instructions.items()
    }
    # VMEM, S(1), is not counted.
    assert moved == {'a': 0, 'i': 0, 'x': 400, 'y': 400, 'z': 800}


# ---- A real program ----

SHAPE = json.loads('{"L": 4, "C": 1024, "H": 8, "K": 4, "M": 2816, "T": 512, "B": 16}')


def forward_flops(L: int, C: int, H: int, K: int, M: int, T: int, B: int) -> tuple[float, float]:
    """Of all devices: dense layers, and attention of a causal mask."""
    D = C // H
    dense = 2 * B * T * C * (2 * C + 2 * K * D) + 3 * 2 * B * T * C * M
    attention = 2 * 2 * B * H * D * T * (T + 1) / 2
    return L * dense, L * attention


@pytest.mark.parametrize('name', ['llama_v5e', 'llama_v5p'])
def test_flops_of_a_scanned_decoder_are_those_of_the_closed_form(name: str) -> None:
    module = hlo.parse((DATA / f'{name}.hlo').read_text())
    total = 0.0
    for instruction in module.entry.instructions.values():
        if instruction.opcode == 'while':
            count = loops.trips(module, module.entry, instruction)
            body = module.computations[instruction.attributes['body'].lstrip('%')]
            total += math.prod((count or 0,)) * sum(
                product.flops
                for inner in body.instructions.values()
                for product in flops.products(module, body, inner)
            )
    assert total == pytest.approx(forward_flops(**SHAPE)[0] / 16, rel=1e-6)
