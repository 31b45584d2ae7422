"""A plan by arithmetic refuses what a run refuses, in the same words."""

import pytest

from bigjax import experiment as experiments
from bigjax.plan.assess import by_closed_form
from bigjax.plan.candidates import every
from bigjax.plan.topology import parse
from bigjax.run import UsageError
from bigjax.state import check_pipeline, setup

TINY = {
    'depth': 4, 'width': 64, 'heads': 8, 'kv_heads': 8, 'hidden': 128, 'vocab': 256, 'seq': 128,
    'batch': 16, 'scan': True, 'dataset': 'blank', 'steps': 1000, 'warmup': 100,
}  # fmt: skip
STAGES = {'mesh': 'stage=2,data=4'}


def refused(function, *args):
    with pytest.raises(UsageError) as error:
        function(*args)
    return str(error.value)


def start(name, knobs):
    """What `bigjax.train.train` does before it compiles."""
    made = experiments.load(name, **knobs)
    check_pipeline(made, setup(made))


@pytest.mark.parametrize(
    ('knobs', 'message'),
    [
        ({'seq': 510, 'mesh': 'data=2,context=4'},
         '--seq=510: must be a multiple of 8, two chunks for each of the 4 parts of a sequence on '
         '--mesh=data=2,context=4; try --seq=512'),
        ({'seq': 510, 'mesh': 'data=2,context=4', 'scan': False}, '--seq=510: must be a multiple'),
        (STAGES | {'microbatches': 3},
         '--microbatches=3: must divide the 4 rows of a batch that a device computes; '
         'try --microbatches=2'),
        (STAGES | {'batch': 20}, '--microbatches=0, one for each of the 2 stages: must divide'),
        (STAGES | {'scan': False},
         '--scan=False: the 2 stages of the mesh need layers that are scanned; try --scan'),
        (STAGES | {'depth': 3}, '--mesh=stage=2,data=4: stage=2 does not divide the 3 layers of'),
        ({'mesh': 'expert=8'}, '--mesh=expert=8: expert=8 shares out experts, and this model has'),
        ({'eval_batch': 12}, '--eval_batch=12: must be a positive multiple of 8, the 8 batch'),
        ({'deterministic': True, 'mesh': 'fsdp=8'}, '--mesh=fsdp=8: --deterministic splits'),
        ({'dcn': 'data=2'},
         '--dcn=data=2: the sizes must multiply to the number of slices, 1; try --dcn='),
        ({'mesh': 'fsdp=4,tensor=2', 'microbatches': 4},
         '--microbatches=4: cuts a batch for the stages of a pipeline, and '
         '--mesh=fsdp=4,tensor=2 has none; try --microbatches=0'),
        ({'context': 'gather', 'rank': 4},
         '--context=gather: says how positions on other devices are seen, and --mesh=data=8 splits '
         'none; try --context=ring'),
    ],
)  # fmt: skip
def test_what_a_run_refuses(knobs, message):
    said = refused(start, 'llama', TINY | knobs)
    assert said.startswith(message)
    assert refused(by_closed_form, 'llama', TINY | knobs, parse('v5e:2x4')) == said


def test_what_other_families_refuse():
    knobs = {'mesh': 'data=4,context=2', 'batch': 8, 'dataset': 'blank'}
    said = refused(start, 'bert', knobs)
    assert 'only decoder-only transformers split positions over context' in said
    assert refused(by_closed_form, 'bert', knobs, parse('v5e:2x4')) == said


@pytest.mark.parametrize('name', ['gpt2', 'gpt3', 'gpt_stdlib', 'llama'])
def test_every_decoder_has_no_knob_that_does_nothing(name):
    knobs = {'microbatches': 2, 'dataset': 'blank', 'batch': 16, 'eval_batch': 16}
    assert refused(start, name, knobs).startswith('--microbatches=2: cuts a batch')


def test_hosts_of_gpus_are_slices_where_they_are_asked_for():
    values = TINY | {'mesh': 'data=2,fsdp=8'}
    plain = by_closed_form('llama', values, parse('h100:16'))
    told = by_closed_form('llama', values | {'dcn': 'data=2'}, parse('h100:16'))
    assert told.closed == plain.closed
    said = refused(by_closed_form, 'llama', values | {'dcn': 'data=4'}, parse('h100:16'))
    assert said.startswith('--dcn=data=4: the sizes must multiply to the number of slices, 2')


def test_a_search_takes_back_what_does_nothing_on_another_mesh():
    found = by_closed_form('llama', TINY | STAGES | {'microbatches': 4}, parse('v5e:2x4'))
    changes = list(every('llama', found))
    staged = [change for change in changes if change['mesh'] == STAGES['mesh']]
    assert staged
    assert all('microbatches' not in change for change in staged)
    others = [change for change in changes if change not in staged]
    assert others
    assert all(change['microbatches'] == 0 for change in others)
