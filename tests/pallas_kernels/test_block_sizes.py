"""Block sizes: they fit the chip and the call, and bad ones are refused by name."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import block_sizes
from pallas_kernels.block_sizes import AttentionShape, BlockSizes
from pallas_kernels.chip import CHIPS, TPUS, named

DTYPES = st.sampled_from(['bfloat16', 'float32'])


@st.composite
def _shapes(draw) -> AttentionShape:
    kv_heads = draw(st.sampled_from([1, 2, 8]))
    return AttentionShape(
        batch=draw(st.integers(1, 4)),
        queries=draw(st.integers(1, 20000)),
        keys=draw(st.integers(1, 20000)),
        heads=kv_heads * draw(st.sampled_from([1, 3, 8])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([8, 40, 64, 128, 192, 256])),
        value_dim=draw(st.sampled_from([8, 64, 128, 256])),
    )


@settings(max_examples=200, deadline=None)
@given(
    shape=_shapes(),
    dtype=DTYPES,
    chip=st.sampled_from(TPUS),
    causal=st.booleans(),
    left=st.one_of(st.none(), st.integers(0, 5000)),
    logit_bytes=st.sampled_from([0, 1, 4, 8]),
)
def test_choices_can_run_and_fit(shape, dtype, chip, causal, left, logit_bytes):
    sizes = block_sizes.choose(
        'attention', shape, dtype, causal=causal, window=(left, left), logit_bytes=logit_bytes,
        chip=named(chip),
    )  # fmt: skip
    block_sizes.check(sizes)
    for part, backward in ((sizes, False), (sizes.backward, True)):
        # No block reaches past the end of the call by a whole register's lanes.
        assert part.q < shape.queries + 128
        assert part.kv < shape.keys + 128
        limit = named(chip).vmem_limit
        # Of long sequences the backward pass takes the keys in parts.
        seen = block_sizes._part(part, shape, backward, limit)
        needed = block_sizes.vmem_bytes(
            part, seen, dtype, logit_bytes=logit_bytes, backward=backward
        )
        smallest = part.q == part.kv == 128
        assert smallest or needed <= limit


def test_little_padding_where_the_length_is_no_multiple():
    shape = AttentionShape(1, 5000, 5000, 8, 8, 128, 128)
    sizes = block_sizes.choose('attention', shape, 'bfloat16', chip=named('v6e'))
    padded = -(-5000 // sizes.q) * sizes.q
    assert padded < 1.06 * 5000


def test_a_narrow_window_gets_narrow_blocks():
    shape = AttentionShape(1, 16384, 16384, 8, 8, 128, 128)
    wide = block_sizes.choose('attention', shape, 'bfloat16', chip=named('v6e'))
    narrow = block_sizes.choose('attention', shape, 'bfloat16', window=(256, 0), chip=named('v6e'))
    assert narrow.kv < wide.kv


@pytest.mark.parametrize('chip', [None, CHIPS['h100']])
def test_without_a_tpu_sizes_are_those_of_one(chip):
    shape = AttentionShape(1, 64, 64, 2, 2, 16, 16)
    sizes = block_sizes.choose('attention', shape, 'float32', chip=chip)
    assert (sizes.q, sizes.kv, sizes.sub, sizes.chunk) == (128, 128, 128, 128)


GOOD = BlockSizes(512, 1024, 256, 256)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'q': 100}, '.q=100: must be a positive multiple of 128; try block_sizes.q=128'),
        ({'kv': -128}, '.kv=-128: must be a positive multiple of 128; try block_sizes.kv=128'),
        ({'sub': 384}, '.sub=384: must divide block_sizes.kv=1024; try block_sizes.sub=256'),
        ({'chunk': 384}, '.chunk=384: must divide block_sizes.q=512; try block_sizes.chunk=256'),
        ({'heads': 0}, '.heads=0: must be positive or None; try block_sizes.heads=None'),
        ({'q': 512.0}, '.q=512.0: must be a positive multiple of 128; try block_sizes.q=128'),
        (
            {'backward': dataclasses.replace(GOOD, kv=64)},
            '.backward.kv=64: must be a positive multiple of 128; try block_sizes.backward.kv=128',
        ),
    ],
)
def test_bad_sizes_are_refused_by_name(change, message):
    block_sizes.check(GOOD)
    with pytest.raises(ValueError, match='; try ') as caught:
        block_sizes.check(dataclasses.replace(GOOD, **change))
    assert str(caught.value) == f'block_sizes{message}'


@pytest.mark.parametrize('backward', [False, True])
def test_sizes_that_do_not_fit_the_chip_are_refused_with_some_that_do(backward):
    shape, chip = AttentionShape(1, 16384, 16384, 8, 8, 128, 128), named('v7x')
    large = BlockSizes(8192, 8192, 2048, 2048, heads=4)
    with pytest.raises(ValueError, match='bytes of VMEM, and a kernel gets 50331648 on v7x;') as no:
        block_sizes.check_fit(large, shape, 'float32', chip=chip, backward=backward)
    name = 'block_sizes' + '.backward' * backward
    assert str(no.value).startswith(f'{name}=BlockSizes(q=8192, kv=8192, sub=2048, chunk=2048, h')
    good = eval(str(no.value).partition(f'; try {name}=')[2])
    block_sizes.check(good)
    block_sizes.check_fit(good, shape, 'float32', chip=chip, backward=backward)


@settings(max_examples=50, deadline=None)
@given(
    shape=_shapes(), dtype=DTYPES, chip=st.sampled_from(TPUS), logit_bytes=st.sampled_from([0, 8])
)
def test_what_is_chosen_may_be_given(shape, dtype, chip, logit_bytes):
    options = {'logit_bytes': logit_bytes, 'chip': named(chip)}
    sizes = block_sizes.choose('attention', shape, dtype, **options)
    for part, backward in ((sizes, False), (sizes.backward, True)):
        block_sizes.check_fit(part, shape, dtype, backward=backward, **options)


def test_rows_of_the_table_can_run():
    for name, row in block_sizes.table().items():
        op, chip, *_ = name.split()
        assert op == 'attention'
        assert chip in TPUS
        for part in ('forward', 'backward'):
            if part in row:
                block_sizes.check(BlockSizes(**row[part]))


def test_an_unknown_op_is_refused():
    with pytest.raises(ValueError, match='attention'):
        block_sizes.choose('pool', AttentionShape(1, 1, 1, 1, 1, 8, 8), 'float32')
