"""Live ranges in small programs written by hand: what shares a buffer, and what does not."""

import pytest

from bigjax.plan.program import hlo
from bigjax.plan.program.memory import account, hbm_peak
from bigjax.plan.records import CATEGORIES

KIB = 1024
STATE = {'parameters': 4 * KIB, 'optimizer': 8 * KIB, 'other': 0}


def memory(body: str, temp: int, *, shapes=(), others: str = ''):
    """Returns the account of a program whose argument is a parameter of 4 KiB."""
    text = f'HloModule step, is_scheduled=true\n{others}\nENTRY %main (p: f32[1024]) -> f32[] {{\n'
    text += '  %p = f32[1024]{0} parameter(0)\n'
    text += ''.join(f'  {line}\n' for line in body.strip().splitlines()) + '}\n'
    given = sum(STATE.values())
    analysis = {
        'state': STATE, 'shapes': [list(shape) for shape in shapes], 'generated_code_size': 7,
        'argument_size': given, 'output_size': given, 'alias_size': given, 'temp_size': temp,
        'peak_memory': given + temp, 'host_argument_size': 0, 'host_temp_size': 0,
    }  # fmt: skip
    return account(hlo.parse(text), analysis)


@pytest.mark.parametrize(
    ('body', 'live'),
    [
        # The result lies where an argument was that is donated.
        ('%a = f32[2048]{0} sine(%p)\nROOT %b = f32[] custom-call(%a)', 8 * KIB),
        # A view takes nothing.
        (
            '%a = f32[2048]{0} sine(%p)\n%v = f32[2,1024]{1,0} bitcast(%a)\n'
            'ROOT %b = f32[] custom-call(%v)',
            8 * KIB,
        ),
        # The sum is written where one of its operands dies.
        (
            '%a = f32[2048]{0} sine(%p)\n%b = f32[2048]{0} cosine(%p)\n'
            '%c = f32[2048]{0} add(%a, %b)\nROOT %d = f32[] custom-call(%c)',
            16 * KIB,
        ),
        # It cannot be where both are read again.
        (
            '%a = f32[2048]{0} sine(%p)\n%b = f32[2048]{0} cosine(%p)\n'
            '%c = f32[2048]{0} add(%a, %b)\nROOT %d = f32[] custom-call(%a, %b, %c)',
            24 * KIB,
        ),
        # VMEM is not HBM.
        (
            '%a = f32[2048]{0:S(1)} sine(%p)\nROOT %b = f32[] custom-call(%a)',
            0,
        ),
    ],
    ids=['two', 'view', 'in-place', 'kept', 'vmem'],
)  # fmt: skip
def test_live_ranges(body, live):
    found = memory(body, 32 * KIB)
    assert found.bytes['activations'] == live
    assert found.bytes['other'] == 32 * KIB - live
    assert sum(found.bytes.values()) == found.total == (12 + 32) * KIB + 7


LOOP = """
%body (c: (s32[], f32[4096])) -> (s32[], f32[4096]) {
  %c = (s32[], f32[4096]{0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = f32[4096]{0} get-tuple-element(%c), index=1
  %t = f32[8192]{0} sine(%x)
  %u = f32[4096]{0} custom-call(%t)
  ROOT %r = (s32[], f32[4096]{0}) tuple(%i, %u)
}
%cond (k: (s32[], f32[4096])) -> pred[] {
  %k = (s32[], f32[4096]{0}) parameter(0)
  ROOT %n = pred[] custom-call(%k)
}
"""


def test_a_loop_carries_its_buffers_and_adds_what_lives_within():
    body = (
        '%z = s32[] custom-call()\n%a = f32[4096]{0} sine(%p)\n'
        '%s = (s32[], f32[4096]{0}) tuple(%z, %a)\n'
        '%w = (s32[], f32[4096]{0}) while(%s), condition=%cond, body=%body\n'
        '%o = f32[4096]{0} get-tuple-element(%w), index=1\nROOT %b = f32[] custom-call(%o)'
    )
    found = memory(body, 64 * KIB, others=LOOP)
    # 16 KiB are carried, 32 KiB live within; the result lies where it is carried.
    assert found.bytes['activations'] == pytest.approx(48 * KIB, abs=8)


def test_what_is_exchanged_and_what_is_shaped_like_a_parameter():
    body = (
        '%g = f32[64,128]{1,0} all-gather(%p), replica_groups={}, dimensions={0}\n'
        '%d = f32[16,128]{1,0} custom-call(%g)\nROOT %b = f32[] custom-call(%g, %d)'
    )
    found = memory(body, 64 * KIB, shapes=[(16, 128)])
    assert found.bytes['collectives'] == 32 * KIB
    assert found.bytes['gradients'] == 8 * KIB
    assert tuple(found.bytes) == CATEGORIES


def test_more_than_the_compiler_found_is_scaled_down():
    body = (
        '%a = f32[2048]{0} sine(%p)\n%g = f32[2048]{0} all-reduce(%a), replica_groups={}\n'
        'ROOT %b = f32[] custom-call(%a, %g)'
    )
    found = memory(body, 8 * KIB)
    assert found.bytes['activations'] == found.bytes['collectives'] == pytest.approx(4 * KIB, abs=4)
    assert sum(found.bytes.values()) == found.total


def test_an_asynchronous_copy_has_one_new_buffer():
    body = (
        '%a = f32[2048]{0} sine(%p)\n'
        '%s = (f32[2048]{0}, f32[2048]{0}, u32[]) copy-start(%a)\n'
        '%d = f32[2048]{0} copy-done(%s)\nROOT %b = f32[] custom-call(%d)'
    )
    assert memory(body, 32 * KIB).bytes['activations'] == 16 * KIB


def test_the_peak_of_vmem_is_not_that_of_hbm():
    analysis = {'argument_size': 10, 'output_size': 8, 'alias_size': 8, 'temp_size': 5,
                'peak_memory': 100}  # fmt: skip
    assert hbm_peak(analysis) == 15
    assert hbm_peak(analysis | {'peak_memory': 12}) == 12
