"""Every kind of convolution compiles for every TPU, forward and backward, within its memory."""

import ahead_of_time
import pytest
from compile_conv import CASES

from pallas_kernels.chip import TPUS


@pytest.mark.slow
@pytest.mark.parametrize('chip', TPUS)
def test_every_kind_compiles_within_its_memory(chip):
    (found,) = ahead_of_time.printed('compile_conv.py', chip)
    assert set(found) == set(CASES)
    for case, report in found.items():
        assert report['kernels'] >= 2, case  # the passes share none, XLA does none of them
        assert report['vmem'] <= report['limit'], case
        # What is turned, padded to whole tiles or kept for the epilogue's derivative has the size
        # of an argument or a result; what a product of patches would hold has that of every tap.
        assert report['temp'] <= report['arrays'], case
