"""The plan by arithmetic, against hand-computed cases and against the models themselves."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import toy
from jax.sharding import AbstractMesh

from bigjax import sharding
from bigjax.experiment import load
from bigjax.mesh import AXES, parse_mesh
from bigjax.models import gpt, llama
from bigjax.nn.moe import Routing
from bigjax.plan.arithmetic.closed_collectives import collectives
from bigjax.plan.arithmetic.closed_flops import executed_flops, model_flops, row_flops
from bigjax.plan.arithmetic.closed_form import closed_form, of_step
from bigjax.plan.arithmetic.shape import Shape, Step, parameter_bytes, shape_of
from bigjax.plan.arithmetic.traced import gradient_flops
from bigjax.plan.records import CATEGORIES
from bigjax.plan.topology import parse

SHAPE = Shape(
    layers=4, width=64, heads=8, kv_heads=4, head_dim=16, hidden=96, vocab=256, tied=False
)
# Of four layers.
MATRICES = 4 * (64 * 16 * (8 + 4 + 4 + 8) + 3 * 64 * 96)
POLICIES = ('none', 'full', 'save_attention', 'save_qkv', 'save_out', 'minimal', 'dots',
            'dots_no_batch')  # fmt: skip


def step(mesh, topology='v5e:4x4', **changes):
    topology = parse(topology)
    sizes = parse_mesh(mesh, topology.devices)
    return Step(**{'batch': 64, 'length': 128, 'mesh': sizes, 'topology': topology, **changes})


def sent(shape, how, *axes):
    """{(kind, what): bytes of one device} of the exchanges over exactly these axes."""
    found = {}
    for c in collectives(shape, how):
        if c.axes == axes:
            found[c.kind, c.what] = found.get((c.kind, c.what), 0) + c.bytes
    return found


def llama_of(shape, **options):
    return llama.Llama(
        vocab_size=shape.vocab,
        context_length=128,
        depth=shape.layers,
        width=shape.width,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        hidden=shape.hidden,
        tied=shape.tied,
        attention_impl='xla',
        routing=shape.routing,
        **options,
    )


MODELS = {
    'llama': llama_of(SHAPE),
    'llama of experts': llama_of(dataclasses.replace(SHAPE, routing=Routing(experts=4))),
    'gpt': gpt.GPT(vocab_size=256, context_length=128, depth=2, width=64, heads=4, bias=True),
    'gpt of experts': gpt.GPT(
        vocab_size=256, context_length=128, depth=2, width=64, heads=4, routing=Routing(experts=4)
    ),
}


# ---- Parameters ----


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('mesh', ['fsdp=16', 'fsdp=2,tensor=4,data=2', 'expert=4,fsdp=4'])
def test_parameters_are_those_of_the_model_and_its_rules(name, mesh):
    model, how = MODELS[name], step(mesh)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))['params']
    rules = llama.RULES if isinstance(model, llama.Llama) else gpt.ODD_VOCAB_RULES
    devices = AbstractMesh(tuple(how.mesh.values()), AXES)
    placed = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.sharding.NamedSharding(
            devices, sharding.spec_for(sharding.path_string(path), x.shape, rules, devices)
        ),
        params,
    )
    assert parameter_bytes(shape_of(model), how) == sharding.bytes_per_device(params, placed)


# ---- Operations ----


NARROW = {'width': 64, 'depth': 2, 'batch': 4, 'dataset': 'blank', 'mesh': 'data=4'}
DECODERS = {
    'llama': {'heads': 8, 'kv_heads': 4, 'hidden': 96},
    'gpt2': {'heads': 4, 'bias': True},
    'gpt3': {'heads': 4},
    'gpt_stdlib': {'heads': 4},
}


def ratio(name: str, **values: Any) -> float:
    """Executed operations of the closed form over those that a decoder's gradient traces to."""
    experiment = load(name, **NARROW | DECODERS[name] | values)
    machine = parse('v5e:2x2')
    executed = closed_form(experiment, machine).executed_flops
    return 4 * executed / gradient_flops(experiment, machine.hardware)


# Short rows keep their weights for the gradient, and 640 positions are long.
@pytest.mark.parametrize(
    'how',
    [{'seq': 640, 'scan': True}, {'seq': 128, 'scan': False, 'experts': 4}],
    ids=['long, scanned', 'short, unrolled, of experts'],
)
@pytest.mark.parametrize('remat', POLICIES)
def test_executed_operations_are_those_of_the_program(remat, how):
    assert ratio('llama', remat=remat, attention='xla', **how) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    ('name', 'how'),
    [
        ('gpt2', {'remat': 'full', 'scan': True}),
        ('gpt2', {'remat': 'dots_no_batch', 'experts': 4}),
        ('gpt3', {'remat': 'minimal', 'scan': True}),
        ('gpt_stdlib', {'remat': 'save_qkv'}),
    ],
)
def test_every_decoder_is_known(name, how):
    assert ratio(name, seq=128, attention='xla', **how) == pytest.approx(1, rel=1e-3)


def test_a_kernel_does_seven_products_of_the_scores_that_are_seen():
    how = step('fsdp=16', saved=None)
    _, attention, _ = row_flops(SHAPE, how)
    seen = 128 * 129 // 2
    assert attention == 4 * 7 * 2 * seen * 8 * 16
    _, again, _ = row_flops(SHAPE, dataclasses.replace(how, saved=frozenset()))
    assert again == attention * 9 / 7


@pytest.mark.parametrize('name', MODELS)
def test_model_operations_are_the_task_s(name):
    shape, family = shape_of(MODELS[name]), llama if 'llama' in name else gpt
    sizes = {'vocab_size': 256, 'length': 128, 'depth': shape.layers, 'width': 64}
    if family is llama:
        sizes |= {'heads': 8, 'kv_heads': 4, 'head_dim': 16, 'hidden': 96}
    forward = family.forward_flops(**sizes, routing=shape.routing)
    assert model_flops(shape, 5, 128) == 5 * 3 * forward
    seen = 3 * 5 * shape.layers * 2 * 2 * shape.heads * shape.head_dim * (128**2 - 128 * 129 / 2)
    assert model_flops(shape, 5, 128) - model_flops(shape, 5, 128, causal=True) == seen


def test_all_devices_share_the_work_but_idle_stages_compute_too():
    flops = executed_flops(SHAPE, step('fsdp=16'))
    assert flops == executed_flops(SHAPE, step('data=2,fsdp=2,tensor=2,context=2'))
    # Two stages, two microbatches, two rounds: 2 * 2 + 1 steps, of which one is idle at each.
    head = row_flops(SHAPE, step('fsdp=16'))[2] * 64 / 16
    assert executed_flops(SHAPE, step('fsdp=8,stage=2')) - head == pytest.approx(
        (flops - head) * 5 / 4
    )


# ---- Collectives ----


def test_fsdp_gathers_parameters_twice_and_spreads_gradients_once():
    C = 1024  # Of which each device has 128.
    shape = dataclasses.replace(SHAPE, layers=1, width=C)
    how = step('fsdp=8', 'v5e:2x4', saved=frozenset({'qkv'}))
    block = (C * 8 * 16 * 2 + C * 4 * 16 * 2 + 3 * C * 96) * 2
    tables = 2 * 256 * C
    gathers = 2 * block + 2 * (2 * C * 4) + tables * 2 + C * 4
    assert sent(shape, how, 'fsdp') == pytest.approx(
        {
            ('all-gather', 'parameters'): gathers * 7 / 8,
            # Of the look-up in float32.
            ('reduce-scatter', 'gradients'): (block + tables / 2 * 4) * 7 / 8,
            # Norms, and of the logits, of which a device has an odd multiple of 128.
            ('all-reduce', 'gradients'): (3 * C * 4 + tables / 2 * 2) * 2 * 7 / 8,
        }
    )
    twice = sent(shape, dataclasses.replace(how, accumulate=2), 'fsdp')
    assert twice['all-gather', 'parameters'] == pytest.approx(2 * gathers * 7 / 8)
    # Projections that are computed again are needed once more for their gradients.
    again = sent(shape, dataclasses.replace(how, saved=frozenset()), 'fsdp')
    projections = (C * 8 * 16 + 2 * C * 4 * 16) * 2
    assert again['all-gather', 'parameters'] == pytest.approx((gathers + projections) * 7 / 8)


def test_with_experts_attentions_last_matrix_is_far_from_its_gradient_too():
    shape = dataclasses.replace(SHAPE, layers=1, routing=Routing(experts=4))
    kept, again = (step('fsdp=4,expert=4', saved=frozenset(s)) for s in ({'qkv', 'out'}, {'qkv'}))
    more = sent(shape, again, 'fsdp')['all-gather', 'parameters']
    more -= sent(shape, kept, 'fsdp')['all-gather', 'parameters']
    assert more == 64 * 8 * 16 * 2 * 3 / 4


def test_all_devices_of_a_square_or_a_box_sum_gradients_whole():
    def gradients(mesh, topology, kind, **changes):
        return sent(SHAPE, step(mesh, topology, **changes), 'fsdp').get((kind, 'gradients'), 0)

    norms, tables = 9 * 64 * 4, 256 * 64 * (4 + 2)  # tables in float32 and in bfloat16
    many = gradients('fsdp=256', 'v5e:16x16', 'all-reduce', batch=256)
    assert many == pytest.approx(2 * (2 * MATRICES + norms + tables) * 255 / 256)
    # Too little for a ring.
    assert gradients('fsdp=16', 'v5e:4x4', 'reduce-scatter') == 0
    # A part of a slice, or all of one of different sides, scatters, but of tables 8 of 64.
    part, small = ('fsdp=8,tensor=2', 'v5e:4x4'), ('fsdp=8', 'v5e:2x4')
    assert gradients(*part, 'reduce-scatter') == 2 * MATRICES / 2 * 7 / 8
    assert gradients(*small, 'reduce-scatter') == 2 * MATRICES * 7 / 8
    assert gradients(*small, 'all-reduce') == pytest.approx(2 * (norms + tables) * 7 / 8)


def test_a_ring_of_products_sends_two_parts_more_than_a_scatter():
    shape = dataclasses.replace(SHAPE, layers=2, width=1024, head_dim=128, hidden=2048)
    matrices = 2 * sum(w.elements for w in shape.weights() if w.makes)
    found = sent(shape, step('fsdp=16'), 'fsdp')
    assert found['reduce-scatter', 'gradients'] == pytest.approx(2 * matrices * 17 / 16)
    few = sent(shape, step('fsdp=16', batch=32), 'fsdp')  # tokens
    assert ('reduce-scatter', 'gradients') not in few


def test_tensor_gathers_and_spreads_the_stream_around_every_half_of_a_block():
    how = step('fsdp=4,tensor=4', saved=frozenset({'context', 'qkv', 'out', 'mlp_in'}))
    stream = 64 / 4 * 128 * 64 * 2 * 3 / 4
    assert sent(SHAPE, how, 'tensor') == {
        ('all-gather', 'activations'): (6 * 4 + 2) * stream,
        ('reduce-scatter', 'activations'): (4 * 4 + 3) * stream,  # one in float32
        ('all-reduce', 'logits'): 3 * 2 * 3 / 4 * 64 / 4 * 128 * 4,
    }
    full = sent(SHAPE, dataclasses.replace(how, saved=frozenset()), 'tensor')
    assert full['reduce-scatter', 'activations'] == (5 * 4 + 3) * stream


def test_data_sums_what_one_device_holds_of_the_gradients():
    found = sent(SHAPE, step('data=4,fsdp=4'), 'data')
    # That of the look-up is float32.
    parts = (2 * MATRICES + 256 * 64 * (4 + 2)) / 4
    assert found == {('all-reduce', 'gradients'): 2 * 3 / 4 * parts}
    whole = (2 * 4 + 1) * 64 * 4  # norms
    found = sent(SHAPE, step('data=4,fsdp=4'), 'data', 'fsdp')
    assert found == {('all-reduce', 'gradients'): 2 * 15 / 16 * whole}


@pytest.mark.parametrize('context', ['ring', 'gather'])
def test_context_moves_keys_and_values(context):
    how = step('fsdp=4,context=4', context=context, saved=frozenset({'context', 'qkv'}))
    numbers = 64 / 4 * 128 / 4 * 2 * 4 * 16  # keys and values of one device and layer
    found = sent(SHAPE, how, 'context')
    if context == 'ring':
        # Three forward, four backward, and gradients all the way round: home in bfloat16.
        assert found['collective-permute', 'keys'] == 4 * (3 + 4) * numbers * 2
        assert found['collective-permute', 'gradients'] == 4 * numbers * (3 * 4 + 2)
    else:
        assert found['all-gather', 'keys'] == 4 * 2 * 3 * numbers * 2
        assert found['reduce-scatter', 'keys'] == 4 * 3 * numbers * 4
    assert found['all-reduce', 'gradients'] > 0


def test_of_two_devices_keys_go_only_where_they_are_needed():
    how = step('fsdp=8,context=2', context='ring', saved=frozenset())  # Once forward, once back.
    numbers = 64 / 8 * 128 / 2 * 2 * 4 * 16
    found = sent(SHAPE, how, 'context')
    assert found['collective-permute', 'keys'] == 4 * (1 + 1) * numbers * 2
    assert found['collective-permute', 'gradients'] == 4 * numbers * (4 + 2)


def test_experts_that_a_tensor_axis_splits_spread_what_they_give_before_it_travels():
    shape = dataclasses.replace(SHAPE, routing=Routing(experts=4, capacity_factor=1.5))
    how = step('fsdp=4,expert=2,tensor=2', saved=None)
    stream, slots = 64 / 8 * 128 * 64 * 2, 4 * math.ceil(1.5 * 128 * 2 / 4)
    whole = 64 / 8 * slots * 64 * 2
    # There whole and back by halves; for the gradient likewise.
    found = sent(shape, how, 'expert')['all-to-all', 'tokens']
    assert found == 4 * 2 * (whole + whole / 2) / 2
    found = sent(shape, how, 'tensor')
    assert found['reduce-scatter', 'tokens'] == 4 * 2 * whole / 2
    # Attention's half as without experts, one in float32 of the logits and one of the look-up.
    assert found['reduce-scatter', 'activations'] == (2 * 4 + 3) * stream / 2
    assert found['all-to-all', 'activations'] == 2 * 4 * stream / 2 / 2
    assert found['all-gather', 'activations'] == (4 * 4 + 2) * stream / 2


def test_devices_that_cannot_share_the_vocabulary_share_positions():
    shape, how = dataclasses.replace(SHAPE, split_vocab=False), step('fsdp=4,tensor=4', saved=None)
    stream, table = 64 / 4 * 128 * 64 * 2, 256 * 64
    found = sent(shape, how, 'tensor')
    for kind in ('all-gather', 'reduce-scatter'):  # Of blocks alone.
        assert found[kind, 'activations'] == 4 * 4 * stream * 3 / 4
    # What FSDP has scattered: of the look-up, float32, and of the output layer, bfloat16.
    assert found['all-reduce', 'gradients'] == 2 * table / 4 * (4 + 2) * 3 / 4


def test_experts_exchange_the_slots_of_their_tokens():
    shape = dataclasses.replace(SHAPE, routing=Routing(experts=4, capacity_factor=1.5))
    how = step('fsdp=4,expert=4', saved=None)
    slots = 4 * math.ceil(1.5 * 128 * 2 / 4)
    whole = 64 / 16 * slots * 64 * 2  # rows of a device, bfloat16
    assert sent(shape, how, 'expert')['all-to-all', 'tokens'] == 4 * 4 * whole * 3 / 4
    again = dataclasses.replace(how, saved=frozenset())
    assert sent(shape, again, 'expert')['all-to-all', 'tokens'] == 4 * 6 * whole * 3 / 4


def test_a_pipeline_hands_microbatches_on():
    how = step('fsdp=8,stage=2', microbatches=4)
    stream = 64 / 8 / 4 * 128 * 64 * 2
    found = sent(SHAPE, how, 'stage')
    # Two rounds: 4 * 2 + 1 steps, and as many for the gradients.
    assert found['collective-permute', 'activations'] == 2 * 9 * stream
    # Every stage is given the whole batch; what it gives back is summed over both.
    assert found['all-reduce', 'activations'] == 2 * 1 / 2 * 4 * stream
    # Each makes the logits of its part of what comes out.
    assert found['all-to-all', 'activations'] == found['all-gather', 'activations'] == 2 * stream
    # Each gives half of its layers away and has half of their gradients back.
    assert found['all-to-all', 'parameters'] == pytest.approx(
        (MATRICES / 16 * (2 + 4) + 8 * 64 / 16 * (2 + 4)) / 2
    )
    four = sent(SHAPE, step('fsdp=4,stage=4', saved=frozenset()), 'stage')
    # One round alone: nothing changes its place.
    assert ('all-to-all', 'parameters') not in four
    eight = sent(dataclasses.replace(SHAPE, layers=8), step('fsdp=4,stage=4'), 'stage')
    # Two rounds of four stages: each gives a layer to all of them, of two that it has.
    assert eight['all-to-all', 'parameters'] == pytest.approx(
        (2 * MATRICES / 16 + 16 * 64 / 16) * (2 + 4) * 2 * 3 / 4
    )
    straight = dataclasses.replace(how, microbatches=3)
    assert ('all-to-all', 'parameters') not in sent(SHAPE, straight, 'stage')


def test_slices_are_crossed_by_what_is_left_after_they_added_up():
    how = step('data=2,fsdp=16', '2*v5e:4x4', dcn={'data': 2})
    (found,) = (c for c in collectives(SHAPE, how) if c.axes == ('data',))
    whole = MATRICES * 2 + 256 * 64 * (4 + 2)
    # Of attention's last matrix a head of 16 leaves seven eighths of its lanes.
    assert (found.network, found.bytes) == ('dcn', (whole + 7 * 4 * 64 * 8 * 16 * 2) / 16)
    assert sent(SHAPE, how, 'fsdp')['all-reduce', 'gradients'] == pytest.approx(whole * 30 / 16)
    wide = sent(dataclasses.replace(SHAPE, width=4096), how, 'fsdp')  # Parts of tables of 256.
    assert wide['reduce-scatter', 'gradients'] == 256 * 4096 * (4 + 2) * 15 / 16
    # Many devices gather small parts by sums.
    once = sent(SHAPE, step('fsdp=64', 'v5e:8x8'), 'fsdp')['all-gather', 'parameters']
    many = sent(SHAPE, step('data=2,fsdp=64', '2*v5e:8x8', dcn={'data': 2}), 'fsdp')
    assert many['all-reduce', 'parameters'] == pytest.approx(2 * once)
    box = sent(SHAPE, step('data=2,fsdp=64', '2*v5p:4x4x4', dcn={'data': 2}), 'fsdp')
    assert {kind for kind, _ in box} == {'all-reduce'}
    assert found.seconds == found.bytes / how.topology.hardware.dcn_bytes_per_s
    both = [c for c in collectives(SHAPE, step('fsdp=32', '2*v5e:4x4', dcn={'fsdp': 2}))
            if c.kind == 'all-gather']  # fmt: skip
    near, far = sorted(both, key=lambda c: c.network == 'dcn')
    # Of 32 parts one device has one; 15 come from its slice, then 16 more by halves of what it has.
    assert near.bytes / far.bytes == pytest.approx((15 / 16) / (1 / 2 / 16))


# ---- Experiments ----

LLAMA = {'size': '2-7B', 'seq': 128, 'dataset': 'blank', 'batch': 64, 'mesh': 'fsdp=16'}


def test_an_experiment_is_planned_by_its_own_model_and_knobs():
    topology = parse('v5e:4x4')
    values = LLAMA | {'dtype': 'bfloat16', 'scan': True, 'remat': 'save_qkv'}
    found = closed_form(load('llama', **values), topology)
    shape = Shape(layers=32, width=4096, heads=32, kv_heads=32, head_dim=128, hidden=11008,
                  vocab=32000)  # fmt: skip
    saved = frozenset({'context', 'qkv'})
    expected = of_step(shape, step('fsdp=16', saved=saved))
    assert found.executed_flops == expected.executed_flops
    assert found.collectives == expected.collectives
    assert found.memory.total == pytest.approx(expected.memory.total, rel=1e-4)
    assert set(found.memory.bytes) == set(CATEGORIES)
    assert sum(found.memory.bytes.values()) == found.memory.total
    assert found.roofline_seconds == max(found.bounds.values())
    assert found.predicted_seconds == found.roofline_seconds / found.efficiency


def test_the_optimizer_waits_in_the_host_s_memory():
    topology = parse('v5e:4x4')
    here = closed_form(load('llama', **LLAMA), topology).memory
    away = closed_form(load('llama', **LLAMA, offload='optimizer'), topology).memory
    assert away.bytes['optimizer'] == 0
    assert away.host_bytes == here.bytes['optimizer']
    assert away.host_bytes == pytest.approx(2 * here.bytes['parameters'], rel=1e-6)


def test_what_is_no_decoder_says_what_is_not_known():
    experiment = toy.build(batch=16, mesh='data=16')[0]
    found = closed_form(experiment, parse('v5e:4x4'))
    assert found.model_flops == 16 * experiment.task.flops_per_example
    # The rows of one device are one; its features need no gradient.
    assert found.executed_flops == experiment.task.flops_per_example - 2 * 16 * 32
    assert found.memory.bytes['activations'] == 0
    assert found.memory.bytes['parameters'] == 4 * (16 * 32 + 2 * 32 + 32 * 8 + 8)
    assert 'activations and collectives are not in these figures' in found.notes[0]
