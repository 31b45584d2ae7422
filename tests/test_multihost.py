"""Two real processes of four devices each, against one process of eight."""

import json
import signal
import socket
import time

import numpy as np
import pytest
import toy

from bigjax import train
from bigjax.data import pipeline
from bigjax.metrics import read_metrics

pytestmark = pytest.mark.slow


def start_two(workdir, knobs, **options):
    """Starts two child processes that train together; they talk over the loopback device."""
    with socket.socket() as listener:
        listener.bind(('localhost', 0))
        port = listener.getsockname()[1]
    together = {'coordinator': f'localhost:{port}', 'processes': 2, **options}
    return [toy.start(workdir, knobs, devices=4, process_id=i, **together) for i in range(2)]


def finish(children):
    """Returns the results that the children print."""
    outputs = [child.communicate(timeout=150) for child in children]
    for child, (_, errors) in zip(children, outputs, strict=True):
        assert child.returncode == 0, errors
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def losses(workdir):
    return {r['step']: r['loss'] for r in read_metrics(workdir / 'metrics.jsonl') if 'set' not in r}


def test_two_processes_equal_one(tmp_path):
    knobs = {'mesh': 'data=2,fsdp=2,tensor=2', 'eval_every': 4}
    two, one = tmp_path / 'two', tmp_path / 'one'
    results = finish(start_two(two, knobs))
    assert results[0] == results[1]
    outcome = toy.fit(one, **knobs)
    assert losses(two) == pytest.approx(losses(one), abs=1e-6)
    expected = toy.leaves(outcome.state.params)
    for path, leaf in np.load(two / 'params.npz').items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-6, err_msg=path)
    evaluated = [
        [r for r in read_metrics(workdir / 'metrics.jsonl') if 'set' in r] for workdir in (two, one)
    ]
    for ours, theirs in zip(*evaluated, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_two_processes_predict_as_one(tmp_path):
    finish(start_two(tmp_path / 'two', {'steps': 2}, scores=True))
    experiment, identity = toy.build(steps=2)
    outcome = train.train(toy.scored(experiment), identity, tmp_path / 'one')
    written = next(r for r in read_metrics(tmp_path / 'two' / 'metrics.jsonl') if 'set' in r)
    for name in ('rows', 'right', 'order'):
        assert written[name] == outcome.scores['test'][name]
    assert written['rows'] == 37


def rows_read(journal):
    """Returns the row numbers in the order one process read them, batch by batch."""
    return [json.loads(line) for line in journal.read_text().splitlines()]


@pytest.mark.parametrize('steps_per_call', [1, 3])
def test_sigterm_to_one_stops_both_and_one_goes_on(tmp_path, steps_per_call):
    knobs = {'steps': 300, 'steps_per_call': steps_per_call}
    children = start_two(tmp_path, knobs, journal=str(tmp_path / 'rows'), delay=0.05)
    while not (tmp_path / 'metrics.jsonl').exists() or len(losses(tmp_path)) < 7:
        time.sleep(0.05)
        assert [child.poll() for child in children] == [None, None], children[0].communicate()
    children[1].send_signal(signal.SIGTERM)
    first, second = finish(children)
    assert first == second
    step = first['step']
    assert 7 <= step < 300
    assert first['signal'] == signal.SIGTERM
    assert list(losses(tmp_path)) == list(range(1, step + 1))

    stop = step + 2 * steps_per_call
    child = toy.start(tmp_path, {**knobs, 'steps': stop}, journal=str(tmp_path / 'rest'))
    assert finish([child])[0]['step'] == stop
    assert list(losses(tmp_path)) == list(range(1, stop + 1))
    halves = [rows_read(tmp_path / f'rows.{i}')[:step] for i in range(2)]
    used = [first + second for first, second in zip(*halves, strict=True)]
    used += rows_read(tmp_path / 'rest.0')
    source = toy.rows(100, 1)
    pipeline_rows = pipeline.train_batches(source, batch=16, seed=0)
    for n in range(stop):
        pipeline_rows[n]
    assert used == [indices.tolist() for indices in source.reads]
    in_epochs = np.concatenate(used)[: stop * 16 // 100 * 100].reshape(-1, 100)
    np.testing.assert_array_equal(
        np.sort(in_epochs, 1), np.tile(np.arange(100), (len(in_epochs), 1))
    )
