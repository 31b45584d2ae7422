"""The start-up summary: its totals add up, and JSON can hold it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import describe, sharding
from bigjax.data.card import Card
from bigjax.data.pipeline import ArrayRecords
from bigjax.experiment import Data, Experiment, Run
from bigjax.identity import Identity
from bigjax.models import gpt
from bigjax.optimizers import Optim, make_optimizer
from bigjax.state import setup
from bigjax.tasks.causal_lm import causal_lm

MODEL = gpt.GPT(vocab_size=12, context_length=8, depth=2, heads=2, width=16)
CARD = Card(name='zeros', description='Nothing but zeros.', sizes={'train': 8})
FLOPS = gpt.forward_flops(vocab_size=12, length=8, depth=2, width=16)


@pytest.fixture(params=['data=-1', 'data=2,fsdp=2,tensor=2'])
def described(request, tmp_path):
    optimizer, schedule = make_optimizer(Optim(optimizer='adamw'), steps=1000)
    records = ArrayRecords({'tokens': np.zeros((8, 9), np.int32)})
    experiment = Experiment(
        task=causal_lm(
            MODEL, length=8, token_bytes_V=np.ones(12), forward_flops=FLOPS, decoder=None
        ),
        optimizer=optimizer,
        schedule=schedule,
        data=Data(train=records, evals={'validation': records}, card=CARD),
        rules=gpt.RULES,
        run=Run(steps=1000, batch=16, mesh=request.param),
    )
    identity = Identity('toy', {'depth': 2}, (), ())
    plan = setup(experiment)
    return describe.describe(experiment, identity, plan, tmp_path), plan


def test_totals_add_up(described):
    told, plan = described
    modules = told['parameters_by_module']
    assert told['parameters'] == sum(modules.values())
    assert told['parameters'] == sum(x.size for x in jax.tree.leaves(plan.abstract.params))
    assert modules['embedding'] == 12 * 16
    assert modules['position'] == 8 * 16
    assert modules['block_0'] == modules['block_1'] == 12 * 16 * 16 + 2 * 16
    assert modules['norm'] == 16


def test_a_step_is_a_batch(described):
    told, _ = described
    assert told['examples_per_step'] == told['batch'] == 16
    assert told['tokens_per_step'] == 16 * 8
    assert told['flops_per_step'] == 3 * FLOPS * 16


def test_state_bytes_are_parameters_and_two_moments_over_the_devices(described):
    told, plan = described
    state = told['state_bytes_per_device']
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(plan.abstract))
    assert 4 * 3 * told['parameters'] <= whole <= 4 * 3 * told['parameters'] + 32
    assert state == sharding.bytes_per_device(plan.abstract, plan.shardings)
    if told['mesh']['fsdp'] == 1:
        assert state == whole
    else:
        assert whole / 4 <= state < whole / 2


def test_json_holds_it(described):
    told, _ = described
    assert json.loads(json.dumps(told)) == told
    assert told['experiment'] == 'toy'
    assert told['knobs'] == {'depth': 2}
    assert np.prod(list(told['mesh'].values())) == 8


def test_parameters_by_module_counts_leaves_at_the_top():
    params = {'a': {'b': jnp.zeros((2, 3)), 'c': jnp.zeros(4)}, 'd': jnp.zeros(())}
    assert describe.parameters_by_module(params) == {'a': 10, 'd': 1}
