"""Branches of a compiled program, of which it does not say how often each is taken."""

import pytest

from bigjax.plan.hardware import HARDWARE
from bigjax.plan.program.kernels import Cost
from bigjax.plan.program.timeline import walk

MS = f'backend_config={{"estimated_cycles":"{round(HARDWARE["v5e"].clock_hz * 1e-3)}"}}'
TEXT = """
%seen () -> f32[103000000] {{
  %x = f32[103000000] parameter(0)
  %k = f32[8] custom-call(%x), custom_call_target="tpu_custom_call"
  ROOT %a = f32[103000000] copy(%x), {ms}
}}
%skipped () -> f32[103000000] {{
  ROOT %y = f32[103000000] parameter(0)
}}
ENTRY %m () -> () {{
  %i = s32[] parameter(0)
  %given = f32[103000000] parameter(1)
  %c = f32[103000000] conditional(%i, %given, %given), branch_computations={{%seen, %skipped}}, metadata={{op_name="jit(step)/{place}/cond"}}
}}
"""  # noqa: E501


@pytest.mark.parametrize(
    ('place', 'share', 'note'),
    [
        ('block/attention/shard_map/while/body', 0.5, 'half of the blocks of a ring of attention'),
        ('update', 1.0, 'the longest branch of a conditional counts'),
    ],
)
def test_a_ring_skips_half_of_its_blocks(place: str, share: float, note: str) -> None:
    text = TEXT.format(ms=MS, place=place)
    kernels = lambda _: Cost(2e-3, 5.0)  # noqa: E731
    found = walk(text, chip='v5e', mesh_shape={'context': 4}, kernels=kernels)
    # A kernel's cost is of the pairs that are seen already.
    assert found.high.kernels == found.low.kernels == 2e-3
    assert found.high.other == pytest.approx(share * 1e-3)
    assert found.low.other == pytest.approx(
        share * 824e6 / HARDWARE['v5e'].hbm_bytes_per_s, rel=1e-2
    )
    assert found.kernel_flops == 5.0
    assert found.notes[0].startswith(note)
