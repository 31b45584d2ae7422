"""The timeline of a compiled program: what computes, what waits, what is hidden."""

import dataclasses
from pathlib import Path

import pytest

from bigjax.plan.hardware import HARDWARE
from bigjax.plan.program import kernels
from bigjax.plan.program.hlo import Array
from bigjax.plan.program.timeline import walk
from bigjax.plan.records import Walk

DATA = Path(__file__).parent / 'data'
V5E = HARDWARE['v5e']
MESH = {'fsdp': 4, 'tensor': 4}
LINK = V5E.ici_bytes_per_s
MS = f'backend_config={{"estimated_cycles":"{round(V5E.clock_hz * 1e-3)}"}}'
GATHER = '%g = f32[50000000] all-gather(%x), replica_groups=[4,4]<=[16], channel_id=1'
GIVEN = '  %x = f32[12500000] parameter(0)\n  %large = f32[103000000] parameter(9)'
PERMUTE = 'source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}'
BACK = 'source_target_pairs={{1,0},{2,1},{3,2},{0,3},{5,4},{6,5},{7,6},{4,7}}'


def timed(*lines: str, before: str = '', known: kernels.Kernels = lambda _: None) -> Walk:
    body = '\n'.join(f'  {line}' for line in lines)
    text = f'{before}\nENTRY %m () -> () {{\n{GIVEN}\n{body}\n}}'
    return walk(text, chip='v5e', mesh_shape=MESH, kernels=known)


def busy(name: str) -> str:
    """A millisecond of other work, by its cycles and by the bytes that it moves."""
    return f'%{name} = f32[103000000] copy(%large), {MS}'


def test_synchronous_exchanges_add_up() -> None:
    found = timed(busy('a'), GATHER, busy('b'))
    row = found.collectives[0]
    assert found.high.other == pytest.approx(2e-3)
    assert row.seconds == pytest.approx(3 * 50e6 / (2 * LINK))
    assert found.high.exposed == pytest.approx(row.seconds)
    assert row.exposed_seconds == pytest.approx(row.seconds)
    assert found.high.hidden == 0
    assert found.high.seconds == pytest.approx(2e-3 + row.seconds)


@pytest.mark.parametrize(('megabytes', 'exposed'), [(25, 0.0), (50, 0.0), (75, 0.5e-3)])
def test_only_what_still_runs_at_the_end_is_exposed(megabytes: int, exposed: float) -> None:
    size = megabytes * 10**6
    found = timed(
        f'%p = u8[{size}] parameter(1)',
        f'%s = (u8[{size}], u8[{size}]) collective-permute-start(%p), {PERMUTE}',
        busy('a'),
        f'%d = u8[{size}] collective-permute-done(%s)',
    )
    assert found.high.exposed == pytest.approx(exposed, abs=1e-9)
    assert found.high.hidden == pytest.approx(size / LINK - exposed)
    assert found.high.seconds == pytest.approx(1e-3 + exposed)
    assert found.collectives[0].exposed_seconds == pytest.approx(exposed, abs=1e-9)


@pytest.mark.parametrize(('second', 'seconds'), [(PERMUTE, 2e-3), (BACK, 1e-3)])
def test_exchanges_share_a_link_and_not_its_other_direction(second: str, seconds: float) -> None:
    found = timed(
        '%p = u8[50000000] parameter(1)',
        f'%s = (u8[50000000]) collective-permute-start(%p), {PERMUTE}',
        f'%t = (u8[50000000]) collective-permute-start(%p), {second}',
        '%d = u8[50000000] collective-permute-done(%s)',
        '%e = u8[50000000] collective-permute-done(%t)',
    )
    assert found.high.exposed == pytest.approx(seconds)


def test_exchanges_along_different_axes_do_not_wait_for_each_other() -> None:
    lines = [
        '%p = u8[30000000] parameter(1)',
        '%s = (u8[30000000], u8[120000000]) all-gather-start(%p), replica_groups=[4,4]<=[16]',
        '%t = (u8[30000000], u8[120000000]) all-gather-start(%p), '
        'replica_groups=[4,4]<=[4,4]T(1,0)',
        '%d = u8[120000000] all-gather-done(%s)',
        '%e = u8[120000000] all-gather-done(%t)',
    ]
    found = timed(*lines)
    assert found.high.exposed == pytest.approx(0.9e-3)
    assert sum(row.seconds for row in found.collectives) == pytest.approx(1.8e-3)


LOOP = """
%body () -> () {{
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[]{{:S(6)}} get-tuple-element(%p), index=0
  %x = f32[8]{{:S(1)}} get-tuple-element(%p), index=1
  %two = s32[] constant(2)
  %n = s32[]{{:S(6)}} add(%i, %two)
  {line}
  ROOT %t = (s32[], f32[8]) tuple(%n, %x)
}}
%condition () -> () {{
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(12)
  ROOT %c = pred[] compare(%i, %n), direction=LT
}}
"""
RUN = (
    '%zero = s32[] constant(0)',
    '%t = (s32[], f32[12500000]) tuple(%zero, %x)',
    'ROOT %w = (s32[], f32[8]) while(%t), condition=%condition, body=%body',
)


def test_loops_run_as_often_as_they_do() -> None:
    # Unrolled by two, so that 12 layers are 6 trips.
    found = timed(*RUN, before=LOOP.format(line=busy('a')))
    assert found.high.other == pytest.approx(6e-3)
    gathered = timed(*RUN, before=LOOP.format(line=GATHER.replace('50000000', '32')))
    assert gathered.collectives[0].count == 6
    assert gathered.high.exposed == pytest.approx(6 * 3 * 32 / (2 * LINK))


def test_a_loop_hides_what_began_before_it() -> None:
    found = timed(
        '%p = u8[250000000] parameter(1)',
        f'%s = (u8[250000000]) collective-permute-start(%p), {PERMUTE}',
        *RUN[:2],
        RUN[2].removeprefix('ROOT '),
        '%d = u8[250000000] collective-permute-done(%s)',
        before=LOOP.format(line=busy('a')),
    )
    assert found.high.exposed == 0
    assert found.high.hidden == pytest.approx(5e-3)


def test_a_loop_without_known_trips_is_told() -> None:
    lines = ('%zero = s32[] parameter(1)', *RUN[1:])
    assert 'trips of this loop are not known' in timed(*lines, before=LOOP.format(line='')).notes[0]


PRODUCT = """
%fused () -> () {
  %p = bf16[4096,4096]{:S(1)} parameter(0)
  %q = bf16[4096,4096]{:S(1)} parameter(1)
  ROOT %c = bf16[4096,4096]{:S(1)} convolution(%p, %q), dim_labels=bf_io->bf
}
"""


@pytest.mark.parametrize(('name', 'again'), [('f', 0.0), ('f.remat2', 2 * 4096.0**3)])
def test_products_are_low_by_arithmetic_and_high_by_cycles(name: str, again: float) -> None:
    found = timed(
        '%p = bf16[4096,4096]{:S(1)} parameter(1)',
        f'%{name} = bf16[4096,4096]{{:S(1)}} fusion(%p, %p), kind=kOutput, calls=%fused, {MS}',
        before=PRODUCT,
    )
    assert found.flops == 2 * 4096**3
    assert found.rematerialized_flops == again
    assert found.low.matmul == pytest.approx(found.flops / 0.95 / V5E.peak_flops)
    assert found.high.matmul == pytest.approx(1e-3)
    assert found.low.other == found.high.other == 0


CHAINED = """
%begin () -> () {
  %p = u8[30000000] parameter(0)
  %g = u8[120000000] all-gather(%p), channel_id=5, replica_groups=[4,4]<=[16]
  ROOT %c = (u8[30000000], u8[120000000]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}
%pursue () -> () {
  %p = u8[30000000] parameter(0)
  %g = u8[120000000] all-gather(%p), channel_id=5, replica_groups=[4,4]<=[16]
  ROOT %t = (u8[120000000]) tuple(%g)
}
%finish () -> () {
  %p = u8[30000000] parameter(0)
  %g = u8[120000000] all-gather(%p), channel_id=5, replica_groups=[4,4]<=[16]
  ROOT %c = u8[120000000] custom-call(%g), custom_call_target="AsyncCollectiveDone"
}
"""


def test_an_exchange_in_several_fusions_is_one() -> None:
    found = timed(
        '%p = u8[30000000]{:S(1)} parameter(1)',
        '%s = (u8[30000000]{:S(1)}) fusion(%p), kind=kCustom, calls=%begin',
        f'%f = (u8[120000000]{{:S(1)}}) fusion(%s), kind=kOutput, calls=%pursue, {MS}',
        '%d = u8[120000000]{:S(1)} fusion(%f), kind=kCustom, calls=%finish',
        before=CHAINED,
    )
    assert [(row.count, row.bytes) for row in found.collectives] == [(1, 90_000_000)]
    assert found.high.exposed == 0
    assert found.high.hidden == pytest.approx(0.9e-3)


def test_another_core_begins_where_it_is_given_its_operands() -> None:
    gather = """
%gather () -> () {
  %p = (u8[30000000]) parameter(0)
  %o = u8[30000000] get-tuple-element(%p), index=0
  ROOT %g = u8[120000000] all-gather(%o), channel_id=5, replica_groups=[4,4]<=[16]
}
"""
    lines = (
        '%p = u8[30000000] parameter(1)',
        '%s = ((), (), (s32[8])) custom-call-start(), called_computations={%gather}',
        busy('a'),
        '%u = ((u8[30000000]), u8[120000000], (s32[8])) custom-call-update(%s, %p)',
        '%d = u8[120000000] custom-call-done(%u)',
    )
    found = timed(*lines, before=gather)
    assert [(row.count, row.bytes) for row in found.collectives] == [(1, 90_000_000)]
    assert found.high.exposed == pytest.approx(0.9e-3)
    assert found.high.other == pytest.approx(1e-3)
    early = timed(*lines[:2], lines[3], busy('a'), lines[4], before=gather)
    assert early.high.exposed == 0


@pytest.mark.parametrize('work', [(), (busy('a'),)], ids=['waits', 'hidden'])
def test_copies_beside_computation_only_add_what_is_left(work: tuple[str, ...]) -> None:
    found = timed(
        '%s = (f32[12500000]{:S(1)}, f32[12500000], u32[]{:S(2)}) copy-start(%x)',
        '%t = ((f32[12500000]), f32[2500000]{:S(1)}, u32[]{:S(2)}) slice-start(%x), slice={[0:9]}',
        *work,
        '%d = f32[12500000]{:S(1)} copy-done(%s)',
        '%e = f32[2500000]{:S(1)} slice-done(%t)',
    )
    assert found.hbm_bytes == 60e6 + len(work) * 824e6
    assert found.high.other == pytest.approx(1e-3 if work else 60e6 / V5E.hbm_bytes_per_s)
    assert found.high.exposed == 0


def test_copies_to_the_host_are_told() -> None:
    found = timed('%s = (f32[12500000]{:S(5)}, f32[12500000], u32[]{:S(2)}) copy-start(%x)')
    told = '47.7 MiB to and from the memory of the host: its time is not counted'
    assert found.notes == (told,)


@pytest.mark.parametrize(
    'line',
    [
        '%s = ((f32[8,250000]{1,0:S(5)}, f32[1,250000], s32[]), f32[8,250000]{1,0:S(5)}, u32[]) '
        'dynamic-update-slice-start(%host, %part, %i)',
        '%s = ((f32[8,250000]{1,0:S(5)}, s32[]), f32[1,250000], u32[]) '
        'dynamic-slice-start(%host, %i)',
    ],
    ids=['written', 'cut'],
)
def test_only_a_slice_travels_to_the_host(line: str) -> None:
    given = ('%host = f32[8,250000]{1,0:S(5)} parameter(1)', '%part = f32[1,250000] parameter(2)',
             '%i = s32[] parameter(3)')  # fmt: skip
    found = timed(*given, line)
    assert found.notes == ('977 KiB to and from the memory of the host: its time is not counted',)


def test_a_reduce_scatter_that_is_written_as_an_all_reduce() -> None:
    scatter = """
%scatter () -> () {
  %p = f32[4096] parameter(0)
  %r = f32[4096] all-reduce(%p), channel_id=5, replica_groups=[4,4]<=[16]
  %i = u32[] partition-id()
  ROOT %d = f32[1024] dynamic-slice(%r, %i), dynamic_slice_sizes={1024}
}
"""
    found = timed(
        '%p = f32[4096] parameter(1)',
        '%f = f32[1024] fusion(%p), kind=kCustom, calls=%scatter',
        '%r = f32[4096] all-reduce(%p), channel_id=6, replica_groups=[4,4]<=[16]',
        before=scatter,
    )
    rows = {row.kind: row.bytes for row in found.collectives}
    assert rows == {'reduce-scatter': 3 * 4096, 'all-reduce': 2 * 3 * 4096}


# ---- Kernels ----

FORWARD = kernels.Kernel(
    'attention_forward',
    (Array('s32', (7,)), Array('bf16', (4, 512, 1024)), *[Array('bf16', (4, 512, 256))] * 2),
    (Array('bf16', (4, 512, 1024)), Array('f32', (4, 8, 1, 512))),
)


def test_calls_of_attention_are_read_from_their_arrays() -> None:
    assert kernels.attention_of(FORWARD) == kernels.Attention(
        'forward', batch=4, queries=512, keys=512, heads=8, kv_heads=2, dim=128, value_dim=128
    )
    backward = kernels.Kernel(
        'attention_backward', (*FORWARD.inputs, *FORWARD.outputs), FORWARD.inputs[1:]
    )
    call = kernels.attention_of(backward)
    assert call
    assert (call.which, call.heads, call.kv_heads) == ('backward', 8, 2)
    pairs = 4 * 8 * 512 * 513 / 2
    assert kernels.attention_of(FORWARD).flops(causal=True) == 2 * 2 * 128 * pairs
    assert call.flops(causal=True) == 5 * 2 * 128 * pairs
    assert call.flops(causal=False) == 5 * 2 * 128 * 4 * 8 * 512**2
    assert kernels.attention_of(kernels.Kernel('conv_dense', (), ())) is None


def test_published_kernels_are_known_too() -> None:
    q, kv = Array('bf16', (3, 8, 512, 128)), Array('bf16', (3, 2, 512, 128))
    mask = Array('s8', (1, 1, 1))
    for name, which in (('fwd_residuals', 'forward'), ('dkv_no_residuals', 'keys'),
                        ('dq_no_residuals', 'queries')):  # fmt: skip
        call = kernels.attention_of(kernels.Kernel(f'splash_mqa_{name}', (mask, q, kv, kv), (q,)))
        assert call
        assert call.published
        assert (call.which, call.batch, call.heads, call.kv_heads) == (which, 3, 8, 2)


def test_table_takes_the_nearest_shape_of_the_chip() -> None:
    cost = kernels.from_table(V5E)(FORWARD)
    call = kernels.attention_of(FORWARD)
    assert cost
    assert call
    row = next(r for r in kernels._table() if (r['chip'], r['dim'], r['length'], r['causal'],
               r['pass']) == ('v5e', 128, 512, True, 'forward'))  # fmt: skip
    assert cost.seconds == pytest.approx(cost.flops / row['ours'] / V5E.peak_flops)
    assert cost.flops == call.flops(causal=True)
    # BERT's and ViT's see all pairs.
    full = kernels.from_table(V5E)(dataclasses.replace(FORWARD, causal=False))
    assert full
    assert full.flops == call.flops(causal=False) > 1.9 * cost.flops
    # v4 has v5p's units; its kernels were not compiled.
    assert kernels.share_of_peak(call, 'v4', True) == kernels.share_of_peak(call, 'v5p', True)
    # An MXU of 256 is half empty for heads of 128.
    long = dataclasses.replace(call, queries=16384, keys=16384)
    assert kernels.share_of_peak(long, 'v6e', True) < 0.6 < kernels.share_of_peak(long, 'v5p', True)
    for name in ('v5e', 'v5p', 'v6e', 'v7x'):
        for causal in (True, False):
            assert 0.1 < kernels.share_of_peak(call, name, causal) <= 1.0


def test_committed_table_is_that_of_the_page() -> None:
    peaks = {name: h.peak_flops for name, h in HARDWARE.items()}
    page = kernels.README.read_text()
    assert kernels.read_table(page, peaks) == kernels._table()


def test_unknown_kernels_take_the_time_of_their_bytes_and_are_told() -> None:
    line = '%k = f32[12500000] custom-call(%x), custom_call_target="tpu_custom_call"'
    found = timed(line)
    assert found.high.kernels == pytest.approx(2 * 50e6 / V5E.hbm_bytes_per_s)
    assert found.notes == ('kernel k: not known; its time is that of its bytes',)
    known = timed(line, known=lambda kernel: kernels.Cost(2e-3, 5.0))
    assert (known.low.kernels, known.kernel_flops, known.flops) == (2e-3, 5.0, 5.0)
    assert not known.notes


# ---- A real program: the forward loop of four layers ----


@pytest.mark.parametrize('chip', ['v5e', 'v5p'])
def test_exchanges_of_a_decoder_are_those_of_the_closed_form(chip: str) -> None:
    found = walk(
        (DATA / f'llama_{chip}.hlo').read_text(), chip=chip, mesh_shape=MESH,
        kernels=kernels.from_table(HARDWARE[chip]),
    )  # fmt: skip
    sums: dict[tuple[str, ...], float] = {}
    for row in found.collectives:
        if row.kind in ('all-gather', 'collective-permute', 'all-reduce'):
            sums[row.axes] = sums.get(row.axes, 0.0) + row.bytes
    # Weights of a device's quarter of the heads and hidden features, gathered from four.
    weights = 4 * (1024 * (256 + 2 * 128 + 256) + 3 * 1024 * 704)
    assert sums['fsdp',] == pytest.approx(2 * weights * 3 / 4, rel=0.01)
    # Two sums a layer of 4 rows' residual stream; the embedding's one is in there, too.
    stream = 4 * 512 * 1024 * 2
    assert sums['tensor',] == pytest.approx((2 * 4 + 1) * stream * 2 * 3 / 4, rel=0.01)
    assert found.low.seconds < found.high.seconds
    # Attention of two heads in each of four layers.
    assert found.kernel_flops == 4 * 2 * 2 * 4 * 2 * 128 * 512 * 513 / 2
    assert not found.notes


def test_what_is_no_product_takes_at_least_its_bytes_and_at_most_its_cycles() -> None:
    cycles = f'backend_config={{"estimated_cycles":"{round(V5E.clock_hz * 4e-3)}"}}'
    found = timed(f'%a = f32[103000000] copy(%large), {cycles}')
    assert found.low.other == pytest.approx(824e6 / V5E.hbm_bytes_per_s)
    assert found.high.other == pytest.approx(4e-3)
