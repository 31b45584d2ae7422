"""Offload: the same bits with the optimizer's state in the host's memory, and what stays where."""

import jax
import numpy as np
import pytest
import same_model
import toy

from bigjax import offload, optimizers, sharding
from bigjax.plan.program.compiled import Request, compile_step, libtpu_missing
from bigjax.run import UsageError
from bigjax.state import setup

MESH = 'data=2,fsdp=4'


def kinds(tree):
    """Returns `{number of dimensions, at most 1: memory kinds}`."""
    found = {0: set(), 1: set()}
    for x in jax.tree.leaves(tree):
        found[min(x.ndim, 1)].add(x.sharding.memory_kind)
    return found


def test_a_run_is_the_same_bit_for_bit_and_goes_on_from_the_other_kind(tmp_path):
    knobs = {'mesh': MESH, 'ema': 0.9}
    plain = toy.fit(tmp_path / 'plain', steps=6, **knobs)
    moved = toy.fit(tmp_path / 'moved', steps=6, offload='optimizer', **knobs)
    assert kinds(plain.state)[1] == {'device'}
    assert kinds(moved.state.opt_state) == {0: {'device'}, 1: {'pinned_host'}}
    assert kinds((moved.state.params, moved.state.extra))[1] == {'device'}
    assert toy.digest(plain.state) == toy.digest(moved.state)
    for folder, kind in (('plain', 'optimizer'), ('moved', 'none')):
        later = toy.fit(tmp_path / folder, steps=8, offload=kind, **knobs)
        digest = toy.digest(later.state)
        assert kinds(later.state.opt_state)[1] == {'pinned_host' if kind != 'none' else 'device'}
        if folder == 'plain':
            first = digest
    assert digest == first


def test_the_average_that_is_evaluated_comes_to_the_device(tmp_path):
    state = toy.fit(tmp_path, steps=2, offload='optimizer', mesh=MESH, ema=0.9).state
    average = optimizers.evaluation_params(state.params, state.opt_state)
    assert kinds(average)[1] == {'device'}
    assert jax.tree.map(lambda x: x.sharding, average) == jax.tree.map(
        lambda x: x.sharding, state.params
    )


def test_what_a_device_holds_is_told_without_what_the_host_holds():
    held = {}
    for kind in ('none', 'optimizer'):
        plan = setup(toy.build(mesh=MESH, offload=kind)[0])
        held[kind] = sharding.bytes_per_device(plan.abstract, plan.shardings)
        own = sharding.bytes_per_device(plan.abstract.params, plan.shardings.params)
    assert held['optimizer'] < held['none'] - 1.5 * own  # Two moments of each parameter.


@pytest.mark.slow
def test_a_tpu_keeps_moments_and_what_enters_blocks_in_the_hosts_memory(tmp_path):
    if missing := libtpu_missing():
        pytest.skip(missing)
    knobs = same_model.TINY | {
        'mesh': 'fsdp=4', 'offload': 'optimizer', 'scan': True, 'remat': 'offload_inputs',
        'attention': 'xla', 'width': 256, 'heads': 2, 'kv_heads': 2, 'seq': 128,
    }  # fmt: skip
    found = compile_step(Request('llama', knobs, 'v5e:2x2'), tmp_path, 300).memory
    moments = 2 * found['state']['parameters']
    assert moments > 2**20
    # Tiles of 8 x 128 are filled up.
    assert moments <= found['host_argument_size'] < 1.5 * moments
    assert found['host_output_size'] == found['host_argument_size']
    assert found['state']['optimizer'] < 64  # counts of steps
    inputs = 2 * 16 // 4 * 128 * 256 * 4  # of two layers, float32
    assert inputs <= found['host_temp_size'] < 2 * inputs, found


class Device:
    """A device that sees no memory but its own."""

    device_kind = 'toaster'

    def addressable_memories(self):
        return []


def test_a_device_that_does_not_see_the_hosts_memory_is_refused():
    class Mesh:
        devices = np.array([Device()])

    with pytest.raises(UsageError) as error:
        offload.check(Mesh())
    assert str(error.value) == (
        "--offload=optimizer: toaster has no memory of kind 'pinned_host'; try --offload=none"
    )
