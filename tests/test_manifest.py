"""What --action=manifest writes: checked by shellcheck and a schema, and run here for real."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from bigjax import experiment as experiments
from bigjax.experiment import UsageError
from bigjax.manifest.options import ManifestOptions
from bigjax.manifest.write import write
from bigjax.metrics import read_metrics

HERE = Path(__file__).parent
ROOT = HERE.parent
TINY = {'steps': 2, 'batch': 16, 'warmup': 0, 'eval_every': 2, 'width': 8}
KNOWN = {
    'share': '10.0.0.2:/runs',
    'image': 'registry/p/bigjax:1',
    'project': 'my-project',
    'zone': 'us-east5-a',
    'repository': 'https://example.com/bigjax.git',
}
MACHINES = [
    ('slurm', 'h100:64'), ('slurm', 'b200:4'), ('gke', '4*v5e:16x16'), ('gke', 'v5e:2x4'),
    ('gke', 'v7x:4x4x4'), ('gke', 'v4:2x2x1'), ('gke', 'h100:16'), ('gke', 'b200:8'),
    ('tpu-vm', 'v5p:4x8x8'), ('tpu-vm', '2*v6e:4x4'), ('tpu-vm', 'v5e:2x4'),
]  # fmt: skip


def written(folder, target, topology, knobs=None, experiment='mlp', **options):
    """Returns the text of every file by its name."""
    asked = ManifestOptions(target=target, **{**KNOWN, **options})
    files = write(experiment, knobs or {}, asked, folder, topology=topology)
    assert all(file.parent == folder / 'manifest' for file in files)
    return {file.name: file.read_text('utf-8') for file in files}


def jobset(folder, topology, **options):
    [text] = written(folder, 'gke', topology, **options).values()
    return yaml.safe_load(text)


def pod(found):
    return found['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']


@pytest.mark.parametrize(('target', 'topology'), MACHINES, ids=lambda value: value)
def test_shellcheck_and_schema(tmp_path, target, topology):
    # Spaces, quotes and what a shell or Kubernetes would put something for.
    knobs = {'dataset': 'csv:it\'s $(HOME) `here` "$x".csv', 'width': 128}
    files = written(tmp_path / 'a run', target, topology, knobs=knobs, spot=True, revision='v1')
    commands = []
    for name, text in files.items():
        assert "it's" not in text.splitlines()[0]
        if name == 'jobset.yaml':
            schema = json.loads((HERE / 'data' / 'jobset_schema.json').read_text('utf-8'))
            found = yaml.safe_load(text)
            jsonschema.validate(found, schema, jsonschema.Draft202012Validator)
            words = pod(found)['containers'][0]['command']
            commands.append([word.replace('$$(', '$(') for word in words])
            assert not [word for word in words if re.search(r'(?<!\$)\$\(', word)]
            continue
        shellcheck = Path(sys.executable).with_name('shellcheck')
        # SC2016 notes that $x is left as it is in quotes, which it must be in a knob.
        check = [shellcheck, '--shell=bash', '--exclude=SC2016', '-']
        told = subprocess.run(check, input=text, capture_output=True, text=True)
        assert told.returncode == 0, told.stdout
        for line in text.splitlines():
            if 'launch.py' in line:
                commands.append(shlex.split(line.removesuffix(' && exit')))
    [command] = commands
    assert f'--dataset={knobs["dataset"]}' in command
    assert '--width=128' in command
    assert not [word for word in command if word.startswith('--batch')]  # its default


def test_slurm_asks_for_a_process_a_gpu(tmp_path):
    [text] = written(tmp_path, 'slurm', 'h100:64', partition='gpu', account='lab').values()
    settings = set(re.findall(r'^#SBATCH (.+)$', text, re.MULTILINE))
    assert {'--nodes=8', '--ntasks-per-node=8', '--gpus-per-node=8', '--exclusive'} <= settings
    assert {'--requeue', '--partition=gpu', '--account=lab'} <= settings
    [text] = written(tmp_path, 'slurm', 'h100:64', time_limit='1-00').values()
    assert '#SBATCH --signal=TERM@300' in text  # the run is saved before its time is over


V5E, V5P = 'tpu-v5-lite-podslice', 'tpu-v5p-slice'


@pytest.mark.parametrize(
    ('topology', 'replicas', 'pods', 'chips', 'selector'),
    [
        ('4*v5e:16x16', 4, 64, 4, {'gke-tpu-accelerator': V5E, 'gke-tpu-topology': '16x16'}),
        ('v5e:2x4', 1, 1, 8, {'gke-tpu-accelerator': V5E, 'gke-tpu-topology': '2x4'}),
        ('v5p:8x8x8', 1, 128, 4, {'gke-tpu-accelerator': V5P, 'gke-tpu-topology': '8x8x8'}),
        ('v7x:4x4x4', 1, 16, 4, {'gke-tpu-accelerator': 'tpu7x', 'gke-tpu-topology': '4x4x4'}),
        ('h100:16', 1, 2, 8, {'gke-accelerator': 'nvidia-h100-80gb'}),
        ('h200:16', 1, 2, 8, {'gke-accelerator': 'nvidia-h200-141gb'}),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_gke_has_a_pod_a_host(tmp_path, topology, replicas, pods, chips, selector):
    found = jobset(tmp_path, topology, restarts=3)
    [job] = found['spec']['replicatedJobs']
    assert job['replicas'] == replicas
    assert job['template']['spec']['parallelism'] == job['template']['spec']['completions'] == pods
    assert found['spec']['failurePolicy']['maxRestarts'] == 3
    assert pod(found)['nodeSelector'] == {f'cloud.google.com/{k}': v for k, v in selector.items()}
    resource = {'nvidia.com/gpu' if topology.startswith('h') else 'google.com/tpu': chips}
    assert pod(found)['containers'][0]['resources'] == {'requests': resource, 'limits': resource}
    # The pods of a slice must not be spread over several node pools.
    assert ('annotations' in found['metadata']) == ('google.com/tpu' in resource)


def test_tpu_vm_rents_the_shape_and_gives_it_back(tmp_path):
    rent = written(tmp_path, 'tpu-vm', 'v5p:4x8x8', spot=True)['tpu_vm.sh']
    create = next(line for line in rent.splitlines() if ' create ' in line)
    words = shlex.split(create)
    expected = '--type=v5p --topology=4x8x8 --runtime-version=v2-alpha-tpuv5 --node-id=mlp --spot'
    assert words[-5:] == expected.split()
    assert 'queued-resources delete mlp' in rent
    files = written(tmp_path, 'tpu-vm', '2*v5e:4x4')
    assert '--accelerator-type=v5litepod-16' in files['tpu_vm.sh']
    assert '--node-count=2 --node-prefix=mlp' in files['tpu_vm.sh']
    assert 'export JAX_NUM_PROCESSES=8\n' in files['host_train.sh']
    assert 'JAX_NUM_PROCESSES' not in written(tmp_path, 'tpu-vm', 'v5e:2x4')['host_train.sh']


@pytest.mark.parametrize(
    ('options', 'wrong', 'rule', 'good'),
    [
        ('target=slurm topology=v5p:8x8x8', 'target=slurm',
         'v5p:8x8x8 is rented from Google Cloud, which has no Slurm for TPUs', 'target=gke'),
        ('target=tpu-vm topology=v7x:4x4x4', 'target=tpu-vm',
         'there are no TPU VMs of v7x in the Cloud TPU API', 'target=gke'),
        ('target=tpu-vm topology=h100:8', 'target=tpu-vm',
         'there are no TPU VMs of h100 in the Cloud TPU API', 'target=slurm'),
        ('target=gke topology=v5e:4x4 image=', 'image=', '--target=gke cannot do without it',
         'image=REGISTRY/PROJECT/bigjax:1'),
        ('target=tpu-vm topology=v5e:4x4 zone=', 'zone=',
         '--target=tpu-vm cannot do without it', 'zone=us-east5-a'),
        ('target=gke topology=2*v5e:2x4', 'topology=2*v5e:2x4',
         'GKE joins slices of several hosts only', 'topology=2*v5e:4x4'),
        ('target=gke topology=2*v5p:2x2x1', 'topology=2*v5p:2x2x1',
         'GKE joins slices of several hosts only', 'topology=2*v5p:2x2x2'),
        ('job=My_Job', 'job=My_Job',
         'must be small letters, digits and -, a letter first, at most 40', 'job=llama-70b'),
        ('partition=gpu;ls', 'partition=gpu;ls', 'has letters that no such name has',
         'partition=gpu'),
        ('share=gs://bucket', 'share=gs://bucket', 'must be SERVER:/PATH', 'share=10.0.0.2:/runs'),
        ('restarts=-1', 'restarts=-1', 'must not be negative', 'restarts=10'),
        ('topology=', 'topology=', 'is empty; name the chips to plan for', 'topology=v5p:8x8x8'),
    ],
)  # fmt: skip
def test_refused_in_words(tmp_path, options, wrong, rule, good):
    given = dict(pair.split('=', 1) for pair in f'topology=h100:8 {options}'.split())
    given |= {name: int(value) for name, value in given.items() if name == 'restarts'}
    message = f'--{wrong}: {rule}; try --{good}'
    topology = given.pop('topology')
    with pytest.raises(UsageError, match=f'^{re.escape(message)}$'):
        write('mlp', {}, ManifestOptions(**{**KNOWN, **given}), tmp_path, topology=topology)
    assert not list(tmp_path.iterdir())


def test_mesh_must_fit_the_chips(tmp_path):
    with pytest.raises(UsageError, match=r'^--mesh=data=3: the sizes multiply to 3, .* devices, 8'):
        written(tmp_path, 'slurm', 'h100:8', knobs={'mesh': 'data=3'})


def test_flags_are_told_apart_from_every_experiments_knobs():
    options = set(ManifestOptions.__dataclass_fields__)
    for name in experiments.names():
        assert not options & experiments.knobs(experiments.find(name)).keys(), name


@pytest.fixture
def port():
    """A free port that a Slurm job's number can stand for; see jax's SlurmCluster."""
    for number in range(65535 - os.getpid() % 3000, 61440, -1):
        with socket.socket() as listener:
            try:
                listener.bind(('localhost', number))
            except OSError:
                continue
            return number
    raise AssertionError('no free port')


def environment(tmp_path, port, devices, **variables):
    """Returns what a process here needs to stand for one on a cluster."""
    tools = tmp_path / 'tools'
    return {
        **os.environ, 'PATH': f'{tools}:{Path(sys.executable).parent}:{os.environ["PATH"]}',
        'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices), 'HOME': str(tmp_path),
        'JAX_COORDINATOR_BIND_ADDRESS': f'localhost:{port}', **variables,
    }  # fmt: skip


def tool(tmp_path, name, text):
    file = tmp_path / 'tools' / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(f'#!/bin/sh\n{text}\n')
    file.chmod(0o755)


def slurm(tmp_path, port, script, **variables):
    """Runs a batch script as Slurm would on one node of two GPUs; returns its exit status."""
    tool(tmp_path, 'srun', f'exec {shlex.quote(sys.executable)} {HERE}/stand_in_srun.py "$@"')
    tool(tmp_path, 'scontrol', f'echo "$@" >> {tmp_path}/scontrol')
    tool(tmp_path, 'squeue', 'echo "${STATE:-RUNNING}"')
    [nodes, tasks] = re.findall(r'^#SBATCH --n\S*=(\d+)$', script, re.MULTILINE)
    batch = {'SLURM_JOB_ID': str(port - 61440), 'SLURM_NTASKS': str(int(nodes) * int(tasks))}
    return subprocess.run(
        ['bash', '-c', script],
        env=environment(tmp_path, port, 1, **batch, **variables),
        timeout=120,
        check=False,
    ).returncode


def test_slurm_starts_a_failed_job_again_but_not_for_ever(tmp_path, port):
    options = {'python': '/bin/false', 'restarts': 2, 'code': str(ROOT)}
    [script] = written(tmp_path / 'run', 'slurm', 'h100:2', **options).values()
    assert slurm(tmp_path, port, script) == 1
    assert (tmp_path / 'scontrol').read_text() == f'requeue {port - 61440}\n'
    slurm(tmp_path, port, script, SLURM_RESTART_COUNT='2')
    slurm(tmp_path, port, script, STATE='COMPLETING')  # it was cancelled
    assert (tmp_path / 'scontrol').read_text() == f'requeue {port - 61440}\n'


def trained(workdir):
    """Returns the steps that a run has logged, and the sizes of its mesh."""
    return [r['step'] for r in read_metrics(workdir / 'metrics.jsonl') if 'set' not in r]


@pytest.mark.slow
def test_sbatch_trains_here(tmp_path, port):
    [script] = written(tmp_path / 'run', 'slurm', 'h100:2', knobs=TINY).values()
    assert slurm(tmp_path, port, script) == 0
    assert trained(tmp_path / 'run') == [1, 2]
    assert not (tmp_path / 'scontrol').exists()


def together(commands):
    """Runs (words, environment, folder) at once; all must succeed."""
    children = [
        subprocess.Popen(words, env=environ, cwd=cwd, stderr=subprocess.PIPE, text=True)
        for words, environ, cwd in commands
    ]
    errors = [child.communicate(timeout=120)[1] for child in children]
    assert [child.returncode for child in children] == [0] * len(children), errors


@pytest.mark.slow
def test_jobset_trains_here(tmp_path, port):
    found = jobset(tmp_path / 'run', 'h100:16', knobs=TINY)
    [container] = pod(found)['containers']
    # The share is no mount here, pod 0 is this machine, and Kubernetes fills in the index.
    command = [word.replace('/runs/', f'{tmp_path}/share/') for word in container['command']]
    told = {each['name']: each.get('value') for each in container['env']}
    told['JAX_COORDINATOR_ADDRESS'] = f'localhost:{port}'
    count = int(told['JAX_NUM_PROCESSES'])
    assert count == 2
    together([
        (command, environment(tmp_path, port, 8, **told | {'JAX_PROCESS_ID': str(i)}), ROOT)
        for i in range(count)
    ])  # fmt: skip
    assert trained(tmp_path / 'share' / 'run') == [1, 2]


@pytest.mark.slow
def test_tpu_vm_trains_here(tmp_path, port):
    files = written(tmp_path / 'run', 'tpu-vm', 'v5p:2x2x2', knobs=TINY)
    script = files['host_train.sh'].replace('/runs/', f'{tmp_path}/share/')
    checkout = tmp_path / 'bigjax'
    checkout.mkdir()
    for name in ('launch.py', 'bigjax', 'experiments', 'pallas_kernels'):
        (checkout / name).symlink_to(ROOT / name)
    (checkout / '.venv').symlink_to(sys.prefix)
    # A metadata server would tell these two.
    told = {'JAX_COORDINATOR_ADDRESS': f'localhost:{port}'}
    together([
        (['bash', '-c', script],
         environment(tmp_path, port, 4, **told, JAX_PROCESS_ID=str(i)), tmp_path)
        for i in range(2)
    ])  # fmt: skip
    assert trained(tmp_path / 'share' / 'run') == [1, 2]
