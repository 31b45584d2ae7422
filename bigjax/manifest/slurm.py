"""A batch script for Slurm, for clusters of NVIDIA GPUs.

https://slurm.schedmd.com/sbatch.html names the options.
"""

import math
import shlex
import sys
from pathlib import Path

from bigjax.manifest.job import GRACE, Job
from bigjax.manifest.options import ManifestOptions
from bigjax.run import UsageError

ROOT = Path(__file__).resolve().parents[2]


def script(job: Job, options: ManifestOptions, workdir: Path) -> str:
    """Returns the text of the batch script.

    Args:
      job: what to run.
      options: `code`, `python`, `partition`, `account` and `time_limit` are used.
      workdir: where the run is kept, on a file system that all nodes share.

    Raises:
      UsageError: the chips are TPUs, which Slurm does not run.
    """
    topology = job.topology
    if topology.hardware.is_tpu:
        raise UsageError(
            f'--target=slurm: {topology.name} is rented from Google Cloud, which has no Slurm for '
            f'TPUs; try --target=gke'
        )
    gpus = math.prod(topology.shape)
    settings = [
        f'--job-name={job.name}',
        f'--nodes={topology.hosts}',
        f'--ntasks-per-node={gpus}',
        f'--gpus-per-node={gpus}',
        '--requeue',
        '--open-mode=append',
    ]
    if gpus == topology.hardware.chips_per_host:
        settings += ['--exclusive', '--mem=0']
    if options.partition:
        settings.append(f'--partition={options.partition}')
    if options.account:
        settings.append(f'--account={options.account}')
    if options.time_limit:
        settings += [f'--time={options.time_limit}', f'--signal=TERM@{GRACE}']
    command = job.command(options.python or sys.executable, workdir)
    return '\n'.join(
        (
            '#!/bin/bash',
            f'# {job.title}',
            *(f'#SBATCH {setting}' for setting in settings),
            'set -u',
            f'cd {shlex.quote(options.code or str(ROOT))} || exit',
            '# A process for every GPU: JAX learns from Slurm which one each of them is. Where one',
            '# ends, the others wait for it for ever: they are ended, too.',
            f'srun --kill-on-bad-exit=1 {shlex.join(command)}',
            'status=$?',
            '# Started again, the run goes on from its last checkpoint; one that was cancelled is',
            '# running no more.',
            f'if ((status != 0 && ${{SLURM_RESTART_COUNT:-0}} < {job.restarts})) &&',
            '  [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then',
            '  scontrol requeue "$SLURM_JOB_ID"',
            'fi',
            'exit "$status"',
            '',
        )
    )
