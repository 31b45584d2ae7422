"""Plans of what is no decoder: they do not claim what is known of decoders alone."""

import dataclasses

import pytest

from bigjax.plan.assess import assess
from bigjax.plan.bottleneck import bottleneck
from bigjax.plan.options import PlanOptions
from bigjax.plan.plan import plan
from bigjax.plan.records import Timeline, Walk
from bigjax.plan.report.terminal import show
from bigjax.plan.topology import parse
from bigjax.plan.trust import UNKNOWN, closed_error

FAST = PlanOptions(topology='v5e:2x2', fast=True)


@pytest.fixture(scope='module')
def recurrent(tmp_path_factory):
    """A language model that is no transformer, by arithmetic."""
    return assess('rnn_lm', {}, parse('v5e:2x2'), FAST, tmp_path_factory.mktemp('kept'))


def test_published_decoders_say_nothing_of_others(recurrent, tmp_path):
    found = plan('rnn_lm', {}, FAST, tmp_path)
    assert found['calibration'] is None
    text = ' '.join(show(found).split())
    assert 'calibration none: no published step time of this kind is known' in text
    assert 'of the model, causal scores' not in text
    _, high = recurrent.step_seconds
    assert high == recurrent.closed.predicted_seconds * (1 + UNKNOWN)
    assert closed_error('v5e') < UNKNOWN


@pytest.mark.parametrize(
    ('moved', 'said'),
    [(0.0, 'many small operations, or much'), (1.0, 'reads and writes HBM')],
)
def test_what_does_not_wait_for_hbm_is_not_said_to(recurrent, moved, said):
    timeline = Timeline(matmul=1e-3, kernels=0, other=9e-3, exposed=0)
    amount = moved * 9e-3 * recurrent.topology.hardware.hbm_bytes_per_s
    walk = Walk(timeline, timeline, 0.0, 0.0, amount, ())
    sentence = bottleneck(dataclasses.replace(recurrent, walk=walk))
    assert sentence.startswith('90 % of the step is neither products nor kernels')
    assert said in sentence
