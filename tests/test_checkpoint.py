"""Checkpoints: bit for bit onto any mesh, strict, and never a torn one."""

import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bigjax.checkpoint import Checkpoints
from bigjax.experiment import UsageError

ROOT = Path(__file__).parent.parent


class State(NamedTuple):
    """Like a train state."""

    step: Any
    params: Any
    opt_state: Any
    extra: Any


def placed(tree, *shape):
    """Shardings of a tree over a mesh of some shape: first dimension over a, second over b."""
    mesh = jax.make_mesh(
        shape, ('a', 'b'), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[: np.prod(shape)]
    )
    return jax.tree.map(
        lambda x: NamedSharding(mesh, PartitionSpec(*('a', 'b')[: min(x.ndim, 2)])), tree
    )


def make_state(**extra):
    params = {
        'block': {'kernel': jax.random.normal(jax.random.key(1), (8, 8))},
        'half': jnp.arange(8, dtype=jnp.bfloat16) / 3,
    }
    optimizer = optax.chain(optax.clip(1.0), optax.adam(1e-3))
    return State(jnp.int32(7), params, optimizer.init(params), {'mean': jnp.ones(8), **extra})


def abstract(state):
    return jax.eval_shape(lambda: state)


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path, keep=2)
    yield made
    made.close()


def save(checkpoints, step, badness=None, state=None):
    state = {'x': jnp.full(4, float(step))} if state is None else state
    checkpoints.save(step, state, progress={'best': badness}, badness=badness)
    checkpoints.wait()


# ---- Round trip ----


@pytest.mark.parametrize('shape', [(8, 1), (2, 4), (1, 1)])
def test_restored_bit_for_bit_onto_another_mesh(tmp_path, shape):
    state = make_state()
    state = jax.device_put(state, placed(state, 4, 2))
    with_progress = {'best': 0.1 + 0.2, 'since_best': 3}
    writer = Checkpoints(tmp_path, keep=1)
    writer.save(5, state, progress=with_progress, badness=0.3)
    writer.close()
    reader = Checkpoints(tmp_path, keep=1)
    shardings = placed(state, *shape)
    restored, progress = reader.restore(5, abstract(state), shardings)
    reader.close()
    assert progress == with_progress
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for old, new, where in zip(*map(jax.tree.leaves, (state, restored, shardings)), strict=True):
        assert new.dtype == old.dtype
        assert new.sharding.is_equivalent_to(where, new.ndim)
        assert np.asarray(new).tobytes() == np.asarray(old).tobytes()


def test_a_save_may_go_on_while_the_state_is_replaced(checkpoints):
    state = {'x': jnp.arange(1 << 20, dtype=jnp.float32)}
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    checkpoints.save(1, state, progress={}, badness=None)
    for _ in range(3):
        state = step(state)
    checkpoints.wait()
    restored, _ = checkpoints.restore(1, abstract(state), placed(state, 1, 1))
    np.testing.assert_array_equal(restored['x'], np.arange(1 << 20, dtype=np.float32))


# ---- Strictness ----


def test_every_leaf_that_does_not_fit_is_named(checkpoints, tmp_path):
    state = make_state(gone=jnp.zeros(2), other=jnp.zeros((2, 3)))
    save(checkpoints, 3, state=state)
    params = {'block': {'kernel': jnp.zeros((4, 16))}, 'half': jnp.zeros(8), 'new': jnp.zeros(1)}
    extra = {'mean': jnp.ones(8), 'other': jnp.zeros((3, 2), jnp.int32)}
    wanted = state._replace(params=params, extra=extra)
    with pytest.raises(UsageError) as error:
        checkpoints.restore(3, abstract(wanted), placed(wanted, 1, 1))
    assert str(error.value).splitlines() == [
        f'--workdir={tmp_path}: checkpoint 3 does not fit this model:',
        '  extra: extra/gone',
        '  missing: params/new',
        '  reshaped: extra/other is (2, 3) there, (3, 2) here',
        '  reshaped: params/block/kernel is (8, 8) there, (4, 16) here',
        '  retyped: extra/other is float32 there, int32 here',
        '  retyped: params/half is bfloat16 there, float32 here',
        'use the knobs and the code it was trained with, or another --workdir',
    ]


# ---- Which are kept, which is chosen ----


def test_the_latest_and_the_best_are_kept(checkpoints):
    for step, badness in [(1, 0.9), (2, 0.1), (3, 0.5), (4, None), (5, 0.4)]:
        save(checkpoints, step, badness)
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best() == 2


def test_the_best_is_still_known_after_a_restart(checkpoints, tmp_path):
    for step, badness in [(1, 0.1), (2, 0.9)]:
        save(checkpoints, step, badness)
    again = Checkpoints(tmp_path, keep=1)
    assert again.best() == 1
    save(again, 3, 0.5)
    assert again.steps() == [1, 3]
    save(again, 4, 0.05)
    assert again.steps() == [4]
    again.close()


def test_what_was_never_evaluated_is_not_best(checkpoints):
    save(checkpoints, 1, None)
    assert checkpoints.best() == 1  # There is no other.
    save(checkpoints, 2, float('nan'))
    assert checkpoints.best() == 2
    save(checkpoints, 3, 0.5)
    assert checkpoints.best() == 3
    save(checkpoints, 4, float('nan'))
    assert checkpoints.best() == 3


def test_saving_a_step_again_changes_nothing(checkpoints):
    save(checkpoints, 1, state={'x': jnp.zeros(4)})
    save(checkpoints, 1, state={'x': jnp.ones(4)})
    restored, _ = checkpoints.restore(
        1, {'x': jax.ShapeDtypeStruct((4,), jnp.float32)}, placed({'x': jnp.ones(4)}, 1, 1)
    )
    np.testing.assert_array_equal(restored['x'], np.zeros(4))


def test_choose(checkpoints):
    for step, badness in [(5, 0.1), (10, 0.9)]:
        save(checkpoints, step, badness)
    assert [checkpoints.choose(w) for w in ('latest', 'best', '5', '10')] == [10, 5, 5, 10]
    for which in ('7', 'newest', ''):
        with pytest.raises(UsageError) as error:
            checkpoints.choose(which)
        assert str(error.value) == (
            f'--checkpoint={which}: must be latest, best or one of 5, 10; try --checkpoint=latest'
        )


def test_choose_where_there_is_none(checkpoints, tmp_path):
    assert checkpoints.best() is None
    with pytest.raises(UsageError) as error:
        checkpoints.choose('latest')
    assert str(error.value) == (
        f'--workdir={tmp_path}: holds no checkpoint yet; train first, with --action=train'
    )


def test_reading_does_not_disturb_a_save_in_progress(checkpoints, tmp_path):
    torn = tmp_path / 'checkpoints' / '9.orbax-checkpoint-tmp'
    torn.mkdir()
    reader = Checkpoints(tmp_path, keep=1)
    assert reader.steps() == []
    time.sleep(0.5)  # Orbax would clean up in the background.
    reader.close()
    assert torn.exists()
    # Who saves, though, takes away what an earlier process left half-written.
    save(checkpoints, 1)
    assert not torn.exists()


# ---- Saves that fail ----

KILLED = """
import os, signal, sys
from pathlib import Path
import jax, jax.numpy as jnp
from bigjax.checkpoint import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]), keep=1)
state = {'x': jnp.arange(1 << 22, dtype=jnp.float32)}
checkpoints.save(1, state, progress={'best': 1.5}, badness=None)
checkpoints.wait()
checkpoints.save(2, jax.tree.map(jnp.negative, state), progress={}, badness=None)
os.kill(os.getpid(), signal.SIGKILL)
"""


def run(code, workdir):
    return subprocess.run(
        [sys.executable, '-c', code, str(workdir)],
        cwd=ROOT, env={'JAX_PLATFORMS': 'cpu', 'PATH': '/bin'}, capture_output=True, timeout=100,
    )  # fmt: skip


def test_a_save_torn_by_sigkill_leaves_the_one_before(tmp_path):
    child = run(KILLED, tmp_path)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert (tmp_path / 'checkpoints' / '2.orbax-checkpoint-tmp').exists()
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.steps() == [1]
    state = {'x': jnp.zeros(1 << 22)}
    restored, progress = checkpoints.restore(1, abstract(state), placed(state, 8, 1))
    np.testing.assert_array_equal(restored['x'], np.arange(1 << 22, dtype=np.float32))
    assert progress == {'best': 1.5}
    # The torn step can be saved again.
    save(checkpoints, 2, state=state)
    assert checkpoints.steps() == [2]
    checkpoints.close()


SMALL = {'x': np.zeros(4, np.float32)}
# Noise, since what is written is compressed.
LARGE = {'x': np.random.default_rng(0).random(1 << 20, np.float32)}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte; mounting it takes root."""
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('may not mount a small file system')
    yield tmp_path
    subprocess.run(['umount', '--lazy', str(tmp_path)], check=True)


@pytest.fixture
def small_files(tmp_path):
    """Files may not grow over 100 kilobytes; anybody may ask for that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield tmp_path
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def told(workdir, step, cause, rest):
    return (
        f'--workdir={workdir}: checkpoint {step} could not be written to {workdir}/checkpoints '
        f'({cause}); {rest}'
    )


GOOD = 'the last good one is 1, from which the same command goes on'


@pytest.mark.parametrize('when', ['wait', 'close', 'next save'])
def test_a_full_disk_is_told(small_disk, when):
    checkpoints = Checkpoints(small_disk, keep=2)
    save(checkpoints, 1, state=jax.device_put(SMALL))
    checkpoints.save(2, jax.device_put(LARGE), progress={}, badness=None)
    ask = {
        'wait': checkpoints.wait,
        'close': checkpoints.close,
        'next save': lambda: checkpoints.save(3, jax.device_put(SMALL), progress={}, badness=None),
    }[when]
    with pytest.raises(OSError, match='--workdir') as error:
        ask()
    assert str(error.value) == told(small_disk, 2, 'No space left on device', GOOD)
    checkpoints.close()
    # A new process goes on from what is left.
    again = Checkpoints(small_disk, keep=2)
    assert again.steps() == [1]
    again.restore(1, abstract(SMALL), placed(SMALL, 1, 1))
    save(again, 2, state=jax.device_put(SMALL))
    again.close()


def test_a_file_that_may_not_grow_is_told(small_files):
    checkpoints = Checkpoints(small_files, keep=2)
    save(checkpoints, 1, state=jax.device_put(SMALL))
    checkpoints.save(2, jax.device_put(LARGE), progress={}, badness=None)
    with pytest.raises(OSError, match='--workdir') as error:
        checkpoints.wait()
    assert str(error.value) == told(small_files, 2, 'File too large', GOOD)
    checkpoints.close()


def test_a_first_save_that_fails_is_told(small_files):
    checkpoints = Checkpoints(small_files, keep=2)
    checkpoints.save(4, jax.device_put(LARGE), progress={}, badness=None)
    with pytest.raises(OSError, match='--workdir') as error:
        checkpoints.wait()
    assert str(error.value) == told(small_files, 4, 'File too large', 'there is no earlier one')
    checkpoints.close()


def test_a_folder_that_is_gone_is_told(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    (tmp_path / 'checkpoints').rmdir()
    (tmp_path / 'checkpoints').write_text('')
    with pytest.raises(OSError, match=r'--workdir=.*: checkpoint 1 could not be written to .*'):
        save(checkpoints, 1)
    checkpoints.close()


GONE = """
import sys
from pathlib import Path
import jax.numpy as jnp
from bigjax.checkpoint import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]), keep=1)
checkpoints.directory.rmdir()
checkpoints.directory.write_text('')
checkpoints.save(1, {'x': jnp.zeros(4)}, progress={}, badness=None)
checkpoints.wait()
"""


def test_a_process_whose_folder_is_gone_ends(tmp_path):
    child = run(GONE, tmp_path)  # Threads of orbax's could keep it for five minutes.
    assert child.returncode == 1
    assert f'SaveError: --workdir={tmp_path}: checkpoint 1 could not' in child.stderr.decode()
