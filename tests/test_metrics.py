"""metrics.jsonl, the lines and the bar a person sees, and the accounts of time."""

import contextlib
import io
import json

import jax.numpy as jnp
import numpy as np
import pytest

from bigjax.metrics import PEAK_FLOPS, TimeSplit, Writer, peak_flops, read_metrics


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """A clock that only moves when told to."""

    now = 100.0

    def __call__(self):
        return self.now


def write(workdir, *, first=1, last=10, steps=10, log_every=4, stream=None, **options):
    options = {'unit': 'tokens', 'units_per_step': 32, **options}
    with Writer(
        workdir, steps=steps, log_every=log_every, stream=stream or io.StringIO(), **options
    ) as writer:
        for step in range(first, last + 1):
            writer.step(step, {'loss': jnp.float32(step), 'grad_norm': 0.5})
            if step % 5 == 0:
                writer.evaluation(step, 'validation', {'loss': np.float32(step)})
    return records(workdir)


def records(workdir):
    def refuse(constant):
        raise AssertionError(f'{constant} is not JSON')

    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def at(found):
    return [(r['step'], r.get('set', 'train')) for r in found]


def test_first_every_and_last_step_are_logged(tmp_path):
    found = write(tmp_path)
    assert at(found) == [
        (1, 'train'), (4, 'train'), (5, 'validation'), (8, 'train'), (10, 'train'),
        (10, 'validation'),
    ]  # fmt: skip
    assert list(found[0])[:3] == ['step', 'loss', 'grad_norm']
    assert [r['loss'] for r in found] == [1, 4, 5, 8, 10, 10]
    assert len(list((tmp_path / 'tensorboard').iterdir())) == 1


def test_steps_that_come_in_strides_are_logged_once_a_multiple(tmp_path):
    with Writer(
        tmp_path, steps=24, log_every=5, unit='images', units_per_step=1, stream=io.StringIO()
    ) as writer:
        for step in range(3, 25, 3):
            writer.step(step, {'loss': 1.0})
    assert [r['step'] for r in records(tmp_path)] == [3, 6, 12, 15, 21, 24]


def test_values_that_are_not_finite_become_null(tmp_path):
    with Writer(
        tmp_path, steps=2, log_every=1, unit='images', units_per_step=1, stream=io.StringIO()
    ) as writer:
        writer.step(1, {'loss': jnp.nan, 'grad_norm': jnp.inf})
    assert records(tmp_path) == [{'step': 1, 'loss': None, 'grad_norm': None}]


@pytest.mark.parametrize('torn', ['', '{"step": 8, "lo', '{"step": 4}'])
def test_resuming_repeats_and_loses_nothing(tmp_path, torn):
    straight = write(tmp_path, last=10)
    write(tmp_path, last=7)
    with (tmp_path / 'metrics.jsonl').open('a') as file:
        file.write(torn)
    resumed = write(tmp_path, first=6, resume_step=5)
    assert at(resumed) == sorted({*at(straight), (6, 'train')}, key=at(resumed).index)
    assert len(set(at(resumed))) == len(resumed)


def test_an_evaluation_that_comes_again_at_the_resumed_step_is_kept_once(tmp_path):
    write(tmp_path, last=5)
    found = write(tmp_path, first=5, resume_step=5)
    assert at(found).count((5, 'validation')) == 1


def test_a_new_run_starts_an_empty_file(tmp_path):
    write(tmp_path, last=5)
    assert at(write(tmp_path, last=1)) == [(1, 'train')]


def test_rate_and_mfu_leave_out_what_is_not_training(tmp_path):
    clock = Clock()
    split = TimeSplit(clock)
    with Writer(
        tmp_path, steps=9, log_every=4, unit='tokens', units_per_step=32, flops_per_step=1e12,
        peak=4e12, split=split, stream=io.StringIO(),
    ) as writer:  # fmt: skip
        for step in range(1, 9):
            with split('compile' if step == 1 else 'step'):
                clock.now += 0.5
            writer.step(step, {'loss': 1.0})
            with split('evaluation'):
                clock.now += 30.0
    first, second, third = records(tmp_path)
    assert 'tokens_per_second' not in first
    for record in (second, third):
        assert record['tokens_per_second'] == pytest.approx(64.0)
        assert record['mfu'] == pytest.approx(0.5)


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    stream = io.StringIO()
    write(tmp_path, stream=stream)
    lines = stream.getvalue().splitlines()
    assert lines[0] == 'step 1/10  loss 1.0000'
    assert lines[1].startswith('step 4/10  loss 4.0000, ')
    assert 'tokens/s, ETA 0.0' in lines[1]
    assert lines[2] == 'step 5/10  validation: loss 5.0000'
    assert '\r' not in stream.getvalue()


def test_a_bar_on_a_terminal(tmp_path):
    stream = Terminal()
    write(tmp_path, stream=stream)
    assert 'step 5/10  validation: loss 5.0000\n' in stream.getvalue()
    assert '10/10' in stream.getvalue().rsplit('\r', 1)[1]
    assert 'loss 10.0000' in stream.getvalue().rsplit('\r', 1)[1]


def test_other_processes_write_nothing(tmp_path):
    stream = io.StringIO()
    with Writer(
        tmp_path / 'absent', steps=2, log_every=1, unit='tokens', units_per_step=1, active=False,
        stream=stream,
    ) as writer:  # fmt: skip
        writer.step(1, {'loss': object()})
        writer.evaluation(1, 'validation', {'loss': object()})
        writer.note('hello')
    assert not list(tmp_path.iterdir())
    assert not stream.getvalue()


def test_reading_passes_over_damage(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n[1]\n{"loss": 2}\n{"step": 2}\n{"step": 3}')
    assert [r['step'] for r in read_metrics(path)] == [1, 2]
    assert list(read_metrics(tmp_path / 'absent')) == []


@pytest.mark.parametrize(
    ('kind', 'known'),
    [
        ('TPU v4', 'TPU v4'),
        ('TPU v5 lite', 'TPU v5 lite'),
        ('TPU v5', 'TPU v5'),
        ('TPU v5p', 'TPU v5'),
        ('TPU v6 lite', 'TPU v6'),
        ('TPU7x', 'TPU7x'),
        ('NVIDIA A100-SXM4-80GB', 'NVIDIA A100'),
        ('NVIDIA H100 80GB HBM3', 'NVIDIA H100'),
        ('NVIDIA H100 PCIe', 'NVIDIA H100 PCIe'),
        ('NVIDIA H200', 'NVIDIA H200'),
        ('NVIDIA B200', 'NVIDIA B200'),
        ('cpu', None),
        ('NVIDIA GeForce RTX 4090', None),
    ],
)
def test_peak_of_a_device(kind, known):
    assert peak_flops(kind) == PEAK_FLOPS.get(known)


def test_time_is_accounted_exactly_once():
    clock = Clock()
    split = TimeSplit(clock)
    clock.now += 1
    with split('step'):
        clock.now += 2
        with split('input'):
            clock.now += 4
        clock.now += 8
    with contextlib.suppress(RuntimeError), split('checkpoint'):
        clock.now += 16
        raise RuntimeError
    clock.now += 32
    seconds = split.seconds()
    assert seconds == {
        'compile': 0, 'step': 10, 'input': 4, 'checkpoint': 16, 'evaluation': 0, 'other': 33
    }  # fmt: skip
    assert split.training() == 47
    assert split.summary() == (
        'time 1:03: other 33.0 s (52.4%), checkpoint 16.0 s (25.4%), step 10.0 s (15.9%), '
        'input 4.00 s (6.3%)'
    )
    with pytest.raises(ValueError, match='no use of time is called lunch'):
        split('lunch')
