"""Which environments announce several processes, and which flags do not fit."""

import jax
import pytest

from bigjax.distributed import announced, join
from bigjax.experiment import UsageError

SRUN = {
    'SLURM_JOB_ID': '1', 'SLURM_NTASKS': '4', 'SLURM_PROCID': '2', 'SLURM_LOCALID': '0',
    'SLURM_STEP_NODELIST': 'n[1-4]', 'SLURM_STEP_NUM_TASKS': '4',
}  # fmt: skip


@pytest.mark.parametrize(
    'environ',
    [
        SRUN,
        {'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_COMM_WORLD_RANK': '0'},
        {'TPU_WORKER_HOSTNAMES': '10.0.0.1,10.0.0.2', 'TPU_WORKER_ID': '0'},
        {'TPU_PROCESS_ADDRESSES': '10.0.0.1:8471,10.0.0.2:8471'},
        # Two slices of one host each, as a JobSet starts them.
        {
            'MEGASCALE_NUM_SLICES': '2',
            'MEGASCALE_SLICE_ID': '1',
            'TPU_WORKER_HOSTNAMES': 'localhost',
        },
        {'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '1'},
    ],
)
def test_several_processes_are_announced(environ):
    assert announced(environ)


@pytest.mark.parametrize(
    'environ',
    [
        {},
        # A shell from salloc, and a batch script, which has a rank, too.
        {'SLURM_JOB_ID': '1', 'SLURM_NTASKS': '4'},
        {'SLURM_JOB_ID': '1', 'SLURM_NTASKS': '4', 'SLURM_PROCID': '0', 'SLURM_LOCALID': '0'},
        {**SRUN, 'SLURM_NTASKS': '1', 'SLURM_PROCID': '0', 'SLURM_STEP_NUM_TASKS': '1'},
        {'OMPI_COMM_WORLD_SIZE': '1'},
        {'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'},
        {'MEGASCALE_NUM_SLICES': '1'},
        {'JAX_NUM_PROCESSES': '1'},
        {'JAX_NUM_PROCESSES': ''},
        # Kubernetes alone is one pod.
        {'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOB_COMPLETION_INDEX': '0'},
    ],
)
def test_one_process_is_not(environ):
    assert not announced(environ)


@pytest.fixture
def initialized(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, 'initialize', lambda *a, **k: calls.append((a, k)))
    return calls


def test_one_process_joins_nobody(initialized):
    join(None, None, None, {})
    assert initialized == []


def test_the_environment_is_left_to_jax(initialized):
    join(None, None, None, SRUN)
    assert initialized == [((), {'num_processes': None, 'process_id': None})]


def test_jax_reads_no_count_and_rank_itself(initialized):
    join(None, None, None, {'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '0'})
    assert initialized == [((), {'num_processes': 2, 'process_id': 0})]


def test_flags_join(initialized):
    join('host:1234', 2, 1, {})
    assert initialized == [(('host:1234', 2, 1), {})]


TOGETHER = (
    '--coordinator, --processes and --process_id: must be given together; try '
    '--coordinator=localhost:9876 --processes=2 --process_id=0'
)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (('host:1', None, None), TOGETHER),
        (('host:1', 2, None), TOGETHER),
        ((None, 2, 0), TOGETHER),
        (
            ('host:1', 2, 2),
            '--process_id=2: must be from 0 to 1, below --processes=2; try --process_id=0',
        ),
        (
            ('host:1', 2, -1),
            '--process_id=-1: must be from 0 to 1, below --processes=2; try --process_id=0',
        ),
        (('host:1', 0, 0), '--processes=0: must be at least 1; try --processes=2'),
        (
            ('host', 2, 0),
            '--coordinator=host: must be HOST:PORT; try --coordinator=host:9876',
        ),
        (
            ('host:', 2, 0),
            '--coordinator=host:: must be HOST:PORT; try --coordinator=host:9876',
        ),
        (
            (':9876', 2, 0),
            '--coordinator=:9876: must be HOST:PORT; try --coordinator=localhost:9876',
        ),
        (
            ('9876', 2, 0),
            '--coordinator=9876: must be HOST:PORT; try --coordinator=localhost:9876',
        ),
    ],
)
def test_flags_that_do_not_fit(initialized, flags, message):
    with pytest.raises(UsageError) as error:
        join(*flags, {})
    assert str(error.value) == message
    assert initialized == []
