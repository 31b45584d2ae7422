import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bigjax.data.augment import Shift, chain, flip
from bigjax.data.pipeline import ArrayRecords, eval_batches, iterate, train_batches
from bigjax.experiment import UsageError


def numbered(size, **more):
    return ArrayRecords({'number': np.arange(size), **more})


def images(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size, 6, 5, 2), np.uint8)
    return ArrayRecords({'image': pixels, 'label': np.arange(size, dtype=np.int32)})


@pytest.mark.parametrize('size', [5, 23, 100])
def test_epochs_back_to_back_lose_and_repeat_nothing(size):
    batches = train_batches(numbered(size), batch=8, seed=3)
    seen = np.concatenate([batches[step]['number'] for step in range(size)])  # 8 epochs
    for epoch in seen.reshape(8, size):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(size))


@pytest.mark.parametrize('hosts', [2, 3, 4, 12])
def test_hosts_together_have_the_batch_of_one(hosts):
    augment = chain(flip, Shift(2))
    whole = train_batches(images(50), batch=12, seed=1, augment=augment)
    parts = [
        train_batches(
            images(50), batch=12, seed=1, augment=augment, process_index=i, process_count=hosts
        )
        for i in range(hosts)
    ]
    for step in (0, 7, 10**6):
        united = {
            name: np.concatenate([part[step][name] for part in parts]) for name in whole[step]
        }
        assert len(parts[0][step]['label']) == 12 // hosts
        for name, array in whole[step].items():
            np.testing.assert_array_equal(united[name], array)


def test_resumed_with_other_hosts_nothing_is_lost_or_repeated():
    records, size = numbered(32), 32
    seen = []
    for start, stop, hosts in ((0, 3, 1), (3, 9, 4), (9, 16, 2)):
        hosts_streams = [
            iterate(
                train_batches(records, batch=8, seed=0, process_index=i, process_count=hosts),
                start=start,
                stop=stop,
            )
            for i in range(hosts)
        ]
        for parts in zip(*hosts_streams, strict=True):
            seen += [part['number'] for part in parts]
    straight = [b['number'] for b in iterate(train_batches(records, batch=8, seed=0), stop=16)]
    np.testing.assert_array_equal(np.concatenate(seen), np.concatenate(straight))
    for epoch in np.concatenate(seen).reshape(4, size):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(size))


def test_augmentation_depends_on_seed_and_step():
    def draws(seed, step):
        drawn = []

        def augment(examples, uniform):
            drawn.extend([uniform(2), uniform(2)])
            return examples

        train_batches(numbered(40), batch=8, seed=seed, augment=augment)[step]
        return drawn

    first, second = draws(0, 0)
    assert first.shape == (8, 2)
    assert first.dtype == np.float64
    assert 0 <= first.min() < first.max() < 1
    np.testing.assert_array_equal(first, draws(0, 0)[0])
    for other in (second, draws(0, 1)[0], draws(1, 0)[0]):
        assert not np.intersect1d(first, other).size


@pytest.mark.parametrize('hosts', [1, 2, 4])
@pytest.mark.parametrize('size', [1, 8, 11, 16])
def test_evaluation_is_exact_on_a_ragged_end(size, hosts):
    tokens = np.arange(3 * size).reshape(size, 3).astype(np.int32)
    records = numbered(size, tokens=tokens, label=np.arange(1, size + 1))
    parts = [
        eval_batches(records, batch=8, process_index=i, process_count=hosts) for i in range(hosts)
    ]
    assert {len(part) for part in parts} == {-(-size // 8)}
    rows = [part[n] for n in range(len(parts[0])) for part in parts]
    rows = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    assert rows['weight'].dtype == np.float32
    assert rows['weight'].sum() == size
    real = rows['weight'] == 1
    np.testing.assert_array_equal(rows['number'][real], np.arange(size))
    np.testing.assert_array_equal(rows['tokens'][real], tokens)
    assert (rows['tokens'][~real] == -1).all()
    assert (rows['label'][~real] == 0).all()


@pytest.mark.parametrize('options', [{}, {'prefetch': 0}, {'prefetch': 5}])
def test_iterating_gives_the_elements_in_order(options):
    batches = train_batches(numbered(20), batch=4, seed=0)
    stream = iterate(batches, start=3, stop=9, **options)
    for step, batch in zip(range(3, 9), stream, strict=True):
        np.testing.assert_array_equal(batch['number'], batches[step]['number'])


@pytest.mark.parametrize('prefetch', [0, 2])
def test_batches_are_placed_in_order(prefetch):
    batches = train_batches(numbered(20), batch=4, seed=0)
    stream = iterate(batches, stop=5, place=lambda b: b['number'].sum(), prefetch=prefetch)
    assert list(stream) == [batches[step]['number'].sum() for step in range(5)]


def test_a_stack_of_one_has_its_axis():
    batches = train_batches(numbered(20), batch=4, seed=0)
    assert next(iterate(batches, stack=1))['number'].shape == (1, 4)


def test_stacks_of_consecutive_batches():
    batches = train_batches(numbered(20), batch=4, seed=0)
    stacks = list(iterate(batches, start=1, stop=8, stack=3))
    assert [len(stack['number']) for stack in stacks] == [3, 3, 1]
    flat = np.concatenate([stack['number'] for stack in stacks])
    np.testing.assert_array_equal(flat, [batches[step]['number'] for step in range(1, 8)])


WORKERS = """
import numpy as np
from absl import app

from bigjax.data.augment import Shift, chain, flip
from bigjax.data.card import MappedArray
from bigjax.data.pipeline import ArrayRecords, iterate, train_batches


def main(argv):
    records = ArrayRecords({'image': MappedArray(argv[1])})
    batches = train_batches(records, batch=4, seed=0, augment=chain(flip, Shift(1)))
    stream = iterate(batches, start=2, stop=9, workers=2)
    for step, batch in zip(range(2, 9), stream, strict=True):
        np.testing.assert_array_equal(batch['image'], batches[step]['image'])
    stream.close()


if __name__ == '__main__':
    app.run(main)
"""


def test_worker_processes_give_the_same(tmp_path):
    np.save(tmp_path / 'image.npy', images(20).arrays['image'])
    (tmp_path / 'main.py').write_text(WORKERS)
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, tmp_path / 'main.py', tmp_path / 'image.npy']
    subprocess.run(command, check=True, timeout=120, env={**os.environ, 'PYTHONPATH': str(root)})


def test_an_error_while_reading_ahead_arrives():
    class Damaged:
        def __len__(self):
            return 4

        def take(self, indices):
            raise UsageError('cat.png is not a readable image')

    with pytest.raises(UsageError, match='is not a readable image'):
        next(iterate(train_batches(Damaged(), batch=2, seed=0)))


@pytest.mark.parametrize(
    ('batch', 'hosts', 'message'),
    [
        (10, 4, '--batch=10: must be a positive multiple of the 4 processes; try --batch=8'),
        (1, 4, '--batch=1: must be a positive multiple of the 4 processes; try --batch=4'),
        (0, 1, '--batch=0: must be a positive multiple of the 1 processes; try --batch=1'),
    ],
)
def test_batch_that_hosts_cannot_share(batch, hosts, message):
    for batches in (lambda **k: train_batches(**k, seed=0), eval_batches):
        with pytest.raises(UsageError, match=f'^{re.escape(message)}$'):
            batches(records=numbered(9), batch=batch, process_count=hosts)


def test_no_records():
    message = '^the data set has no records: nothing to make a batch from$'
    with pytest.raises(UsageError, match=message):
        train_batches(numbered(0), batch=4, seed=0)
    with pytest.raises(UsageError, match=message):
        eval_batches(numbered(0), batch=4)
