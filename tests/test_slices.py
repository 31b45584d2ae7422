"""A job of several slices, as a user starts it: one process is killed, the rest go on as fewer."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bigjax import experiment as experiments
from bigjax import train
from bigjax.identity import identity
from bigjax.metrics import read_metrics

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
KNOBS = {
    'depth': 1, 'heads': 2, 'kv_heads': 2, 'width': 16, 'hidden': 32, 'seq': 16, 'batch': 16,
    'dataset': f'files:{ROOT / "LICENSE"}', 'tokenizer': 'bytes', 'vocab': 256, 'warmup': 0,
    'schedule': 'constant', 'steps': 300, 'save_every': 4, 'log_every': 1, 'eval_batch': 64,
}  # fmt: skip


def start(processes, workdir, **knobs):
    """Starts launch.py in so many processes, each a slice with its share of eight devices."""
    with socket.socket() as listener:
        listener.bind(('localhost', 0))
        address = f'localhost:{listener.getsockname()[1]}'
    flags = {**KNOBS, 'mesh': 'data=4,tensor=2', 'dcn': f'data={processes}', **knobs}
    flags |= {'workdir': workdir, 'coordinator': address, 'processes': processes}
    command = [sys.executable, str(ROOT / 'launch.py'), '--experiment=llama']
    command += [f'--{name}={value}' for name, value in flags.items()]
    environ = {
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        'JAX_NUM_CPU_DEVICES': str(8 // processes),
        'JAX_COORDINATOR_BIND_ADDRESS': address,
        'XDG_CACHE_HOME': str(workdir.parent),
    }
    return [
        subprocess.Popen([*command, f'--process_id={i}'], env=environ, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True)
        for i in range(processes)
    ]  # fmt: skip


def losses(workdir):
    records = read_metrics(workdir / 'metrics.jsonl')
    return [(r['step'], r['loss']) for r in records if 'set' not in r]


def test_a_killed_job_goes_on_with_fewer_processes(tmp_path):
    run = tmp_path / 'run'
    children = start(4, run)
    try:
        deadline = time.monotonic() + 150
        while not (run / 'metrics.jsonl').exists() or len(losses(run)) < 6:
            time.sleep(0.02)
            ended = [child.poll() for child in children]
            assert ended == [None] * 4, next(c.stdout.read() for c in children if c.poll())
            assert time.monotonic() < deadline
        children[2].send_signal(signal.SIGKILL)
        assert children[2].wait() == -signal.SIGKILL
    finally:
        for child in children:  # As a scheduler does when a part of a job is gone.
            child.kill()
            child.wait()
            child.stdout.close()
    done = len(losses(run))
    assert 6 <= done < 300

    stop = done - done % 4 + 8
    children = start(2, run, steps=stop)
    outputs = [child.communicate(timeout=150)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs[0]
    at = next(line for line in outputs[0].splitlines() if 'going on from step' in line)
    assert int(at.split()[-1]) in range(4, stop, 4)
    again = losses(run)
    assert [step for step, _ in again] == list(range(1, stop + 1))

    knobs = {**KNOBS, 'steps': stop, 'mesh': 'data=8'}
    straight = experiments.load('llama', **knobs)
    train.train(straight, identity('llama', experiments.find('llama'), knobs), tmp_path / 'one')
    # The text differs from batch to batch, and so would the losses of other batches.
    expected = [loss for _, loss in losses(tmp_path / 'one')]
    assert [loss for _, loss in again] == pytest.approx(expected, abs=1e-5)
