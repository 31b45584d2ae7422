"""The gcloud commands that rent TPU VMs, set them up, and train on all of them.

https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources names the commands,
https://cloud.google.com/tpu/docs/runtimes the software of the machines.
"""

import shlex
from importlib import metadata
from pathlib import PurePosixPath

from bigjax.manifest.job import Job
from bigjax.manifest.options import ManifestOptions
from bigjax.run import UsageError

RUNTIMES = {
    'v4': 'tpu-ubuntu2204-base',
    'v5e': 'v2-alpha-tpuv5-lite',
    'v5p': 'v2-alpha-tpuv5',
    'v6e': 'v2-alpha-tpuv6e',
}
FLAT = {'v5e': 'v5litepod', 'v6e': 'v6e'}  # flat slices have a name by their number of chips
RUNS = PurePosixPath('/runs')  # where a host sees the share, which root may write to
PYTHON = '3.12'


def scripts(job: Job, options: ManifestOptions) -> dict[str, str]:
    """Returns scripts for bash by file name: one for the user, two that it takes to every host.

    Args:
      job: what to run.
      options: `project`, `zone`, `repository`, `revision`, `share` and `spot` are used.

    Raises:
      UsageError: a flag is missing, or such chips are not rented this way.
    """
    topology, name = job.topology, job.topology.hardware.name
    if name not in RUNTIMES:
        other = 'gke' if topology.hardware.is_tpu else 'slurm'
        raise UsageError(
            f'--target=tpu-vm: there are no TPU VMs of {name} in the Cloud TPU API; '
            f'try --target={other}'
        )
    options.require(
        project='my-project', zone='us-east5-a', share='10.0.0.2:/runs',
        repository='https://github.com/ME/bigjax.git',
    )  # fmt: skip
    files = {
        'tpu_vm.sh': _rent(job, options),
        'host_setup.sh': _setup(job, options),
        'host_train.sh': _train(job),
    }
    return {file: '\n'.join(('#!/bin/bash', *lines, '')) for file, lines in files.items()}


def _rent(job: Job, options: ManifestOptions) -> list[str]:
    where = [job.name, f'--project={options.project}', f'--zone={options.zone}']
    everywhere = [*where[1:], '--node=all', '--worker=all']
    to_hosts = ['scp', 'host_setup.sh', 'host_train.sh', f'{job.name}:', *everywhere]
    state = _queued('describe', *where, '--format=value(state.state)')
    train = 'nohup bash host_train.sh > train.log 2>&1 < /dev/null &'
    return [
        f'# {job.title}',
        'set -euo pipefail',
        'cd "$(dirname "$0")"',
        '',
        '# Chips are paid for from when they are there until they are given back with:',
        f'#   {_queued("delete", *where, "--force")}',
        f'{_queued("describe", *where)} > /dev/null 2>&1 ||',
        f'  {_queued("create", *where, *_size(job), *["--spot"] * options.spot)}',
        f'until [[ $({state}) == ACTIVE ]]; do',
        f'  case $({state}) in FAILED | SUSPENDED) exit 1 ;; esac',
        '  sleep 30',
        'done',
        '',
        _queued(*to_hosts),
        _queued('ssh', job.name, *everywhere, '--command=bash host_setup.sh'),
        _queued('ssh', job.name, *everywhere, f'--command={train}'),
        '',
        '# What the first host says:',
        _queued('ssh', *where, '--node=0', '--worker=0', '--command=tail --follow=name train.log'),
    ]


def _queued(*words: str) -> str:
    return shlex.join(['gcloud', 'compute', 'tpus', 'queued-resources', *words])


def _size(job: Job) -> list[str]:
    topology, name = job.topology, job.topology.hardware.name
    if name in FLAT:
        kind = [f'--accelerator-type={FLAT[name]}-{topology.chips // topology.slices}']
    else:
        kind = [f'--type={name}', f'--topology={"x".join(map(str, topology.shape))}']
    kind.append(f'--runtime-version={RUNTIMES[name]}')
    if topology.slices == 1:
        return [*kind, f'--node-id={job.name}']
    return [*kind, f'--node-count={topology.slices}', f'--node-prefix={job.name}']


def _setup(job: Job, options: ManifestOptions) -> list[str]:
    """What every host does first; done a second time, it does no harm."""
    jax = shlex.quote(f'jax[tpu]=={metadata.version("jax")}')
    clone = f'[ -d bigjax ] || git clone {shlex.quote(options.repository)} bigjax'
    checkout = [f'git checkout {shlex.quote(options.revision)}'] * bool(options.revision)
    return [
        '# Run on every host: the code, its packages, and the share where the run is kept.',
        'set -euo pipefail',
        f'sudo mkdir -p {RUNS}',
        'sudo apt-get -o DPkg::Lock::Timeout=600 install -y nfs-common',
        f'mountpoint -q {RUNS} || sudo mount -t nfs {shlex.quote(options.share)} {RUNS}',
        f'sudo install -d -m 1777 {shlex.quote(str(RUNS / job.folder))}',
        clone,
        'cd bigjax',
        *checkout,
        'python3 -m pip install --user uv',
        f'python3 -m uv venv --allow-existing --python {PYTHON} .venv',
        f'python3 -m uv pip install --python .venv/bin/python -r requirements.txt {jax}',
    ]


def _train(job: Job) -> list[str]:
    """What every host does then: train, and go on from the last checkpoint after a failure."""
    hosts = job.topology.hosts
    several = [
        '# JAX asks the metadata server which of them this host is, and where the first one is.',
        f'export JAX_NUM_PROCESSES={hosts}',
    ]
    return [
        f'# Run on every host. {job.title}',
        'cd bigjax || exit',
        *several * (hosts > 1),
        f'for ((attempt = 0; attempt <= {job.restarts}; attempt++)); do',
        f'  {shlex.join(job.command(".venv/bin/python", RUNS / job.folder))} && exit',
        '  sleep 10',
        'done',
        'exit 1',
    ]
