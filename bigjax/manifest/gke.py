"""A JobSet for Google Kubernetes Engine: every slice a Job, every host a pod.

Fields: https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2. Labels of nodes and resources:
cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus and …/how-to/gpus.
"""

import math
from pathlib import PurePosixPath
from typing import Any

import yaml

from bigjax.manifest.job import GRACE, Job
from bigjax.manifest.options import ManifestOptions
from bigjax.run import UsageError

# What GKE calls a node's chips: the value of cloud.google.com/gke-tpu-accelerator.
TPUS = {
    'v4': 'tpu-v4-podslice',
    'v5e': 'tpu-v5-lite-podslice',
    'v5p': 'tpu-v5p-slice',
    'v6e': 'tpu-v6e-slice',
    'v7x': 'tpu7x',
}
# The value of cloud.google.com/gke-accelerator.
GPUS = {'h100': 'nvidia-h100-80gb', 'h200': 'nvidia-h200-141gb', 'b200': 'nvidia-b200'}
RUNS = PurePosixPath('/runs')  # where a pod sees the share
PORT = 9876


def manifest(job: Job, options: ManifestOptions) -> str:
    """Returns the text of the JobSet.

    Args:
      job: what to run.
      options: `image`, `share`, `namespace` and `spot` are used.

    Raises:
      UsageError: a flag is missing, or GKE cannot join such slices.
    """
    options.require(image='REGISTRY/PROJECT/bigjax:1', share='10.0.0.2:/runs')
    topology = job.topology
    if topology.hardware.is_tpu and topology.slices > 1 and topology.hosts_per_slice == 1:
        raise UsageError(
            f'--topology={topology.name}: GKE joins slices of several hosts only; '
            f'try --topology={topology.slices}*{topology.hardware.name}:'
            f'{"4x4" if topology.hardware.dimensions == 2 else "2x2x2"}'
        )
    head = (
        f'# {job.title}\n'
        f'# Start it with kubectl apply -f; the cluster needs JobSet (jobset.sigs.k8s.io).\n'
    )
    if not topology.hardware.is_tpu:
        head += (
            '# The fast network between GPU nodes is a matter of their node pool, not set here.\n'
        )
    return head + yaml.safe_dump(jobset(job, options), sort_keys=False, width=1000)


def jobset(job: Job, options: ManifestOptions) -> dict[str, Any]:
    """Returns the JobSet as an object of the Kubernetes API."""
    topology, metadata = job.topology, {'name': job.name, 'namespace': options.namespace}
    annotations = {}
    if topology.hardware.is_tpu:
        # A slice is one node pool: its pods must not be spread over several.
        annotations['alpha.jobset.sigs.k8s.io/exclusive-topology'] = 'cloud.google.com/gke-nodepool'
    # Slices are Jobs; GPU hosts, each a "slice" of its own, are the pods of one Job.
    replicas = topology.slices if topology.hardware.is_tpu else 1
    pods = topology.hosts // replicas
    return {
        'apiVersion': 'jobset.x-k8s.io/v1alpha2',
        'kind': 'JobSet',
        'metadata': metadata | ({'annotations': annotations} if annotations else {}),
        'spec': {
            # One lost pod ends all, and all start again: the run goes on from its checkpoint.
            'failurePolicy': {'maxRestarts': job.restarts},
            'replicatedJobs': [
                {
                    'name': 'slice',
                    'replicas': replicas,
                    'template': {
                        'spec': {
                            'parallelism': pods,
                            'completions': pods,
                            'completionMode': 'Indexed',
                            'backoffLimit': 0,
                            'template': {'spec': _pod(job, options)},
                        }
                    },
                }
            ],
        },
    }


def _pod(job: Job, options: ManifestOptions) -> dict[str, Any]:
    topology = job.topology
    server, _, path = options.share.partition(':')
    chips = math.prod(topology.shape) // topology.hosts_per_slice
    selector = _selector(job)
    if options.spot:
        selector['cloud.google.com/gke-spot'] = 'true'
    resource = 'google.com/tpu' if topology.hardware.is_tpu else 'nvidia.com/gpu'
    container: dict[str, Any] = {
        'name': 'train',
        'image': options.image,
        'command': [_literal(word) for word in job.command('python', RUNS / job.folder)],
        'resources': {'requests': {resource: chips}, 'limits': {resource: chips}},
        'volumeMounts': [{'name': 'runs', 'mountPath': str(RUNS)}],
    }
    volumes: list[dict[str, Any]] = [{'name': 'runs', 'nfs': {'server': server, 'path': path}}]
    if not topology.hardware.is_tpu:
        # TPU hosts are told by GKE who they are; JAX is told here of GPU hosts. NCCL talks through
        # shared memory, of which a container has 64 MiB by itself.
        if topology.hosts > 1:
            container['env'] = _environment(job)
        container['volumeMounts'].append({'name': 'memory', 'mountPath': '/dev/shm'})
        volumes.append({'name': 'memory', 'emptyDir': {'medium': 'Memory'}})
    return {
        'restartPolicy': 'Never',
        'terminationGracePeriodSeconds': GRACE,
        'nodeSelector': selector,
        'containers': [container],
        'volumes': volumes,
    }


def _selector(job: Job) -> dict[str, str]:
    hardware = job.topology.hardware
    if not hardware.is_tpu:
        return {'cloud.google.com/gke-accelerator': GPUS[hardware.name]}
    return {
        'cloud.google.com/gke-tpu-accelerator': TPUS[hardware.name],
        'cloud.google.com/gke-tpu-topology': 'x'.join(map(str, job.topology.shape)),
    }


def _environment(job: Job) -> list[dict[str, Any]]:
    """What JAX must know to join the processes; JobSet gives pod 0 of the Job this host name."""
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return [
        {'name': 'JAX_COORDINATOR_ADDRESS', 'value': f'{job.name}-slice-0-0.{job.name}:{PORT}'},
        {'name': 'JAX_NUM_PROCESSES', 'value': str(job.topology.hosts)},
        {'name': 'JAX_PROCESS_ID', 'valueFrom': {'fieldRef': {'fieldPath': index}}},
    ]


def _literal(word: str) -> str:
    """Kubernetes puts variables for $(NAME) in a command; $$ keeps it as it is."""
    return word.replace('$(', '$$(')
