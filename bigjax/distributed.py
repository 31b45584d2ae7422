"""Joining the other processes of a run, where there are any."""

from collections.abc import Mapping

import jax

from bigjax.experiment import UsageError


def announced(environ: Mapping[str, str]) -> bool:
    """Returns whether the environment says that this is one of several processes.

    Known are SLURM, Open MPI, Cloud TPU pods, multi-slice TPU (also in a Kubernetes JobSet), and
    JAX's own variables.
    """
    counts = (
        'SLURM_STEP_NUM_TASKS',  # What srun starts. A batch script has SLURM_NTASKS, too.
        'OMPI_COMM_WORLD_SIZE',
        'JAX_NUM_PROCESSES',
        'MEGASCALE_NUM_SLICES',
    )
    hosts = (environ.get(name, '') for name in ('TPU_WORKER_HOSTNAMES', 'TPU_PROCESS_ADDRESSES'))
    several = any(environ.get(name, '1') not in ('', '0', '1') for name in counts)
    return several or any(',' in names for names in hosts)


def join(
    coordinator: str | None,
    processes: int | None,
    process_id: int | None,
    environ: Mapping[str, str],
) -> None:
    """Calls `jax.distributed.initialize` when flags or environment announce several processes.

    Args:
      coordinator: HOST:PORT of process 0; None asks the environment.
      processes: number of processes.
      process_id: number of this one, from 0.
      environ: the environment variables.

    Raises:
      UsageError: the three flags are not given together, or do not fit.
    """
    if coordinator is None and processes is None and process_id is None:
        if announced(environ):
            count, rank = environ.get('JAX_NUM_PROCESSES'), environ.get('JAX_PROCESS_ID')
            jax.distributed.initialize(
                num_processes=int(count) if count else None,
                process_id=int(rank) if rank else None,
            )
        return
    if coordinator is None or processes is None or process_id is None:
        raise UsageError(
            '--coordinator, --processes and --process_id: must be given together; try '
            '--coordinator=localhost:9876 --processes=2 --process_id=0'
        )
    if processes < 1:
        raise UsageError(f'--processes={processes}: must be at least 1; try --processes=2')
    if not 0 <= process_id < processes:
        raise UsageError(
            f'--process_id={process_id}: must be from 0 to {processes - 1}, below '
            f'--processes={processes}; try --process_id=0'
        )
    host, _, port = coordinator.rpartition(':')
    if not (host and port.isdigit()):
        host = host or ('localhost' if port.isdigit() or not port else port)
        raise UsageError(
            f'--coordinator={coordinator}: must be HOST:PORT; try --coordinator={host}:9876'
        )
    jax.distributed.initialize(coordinator, processes, process_id)
