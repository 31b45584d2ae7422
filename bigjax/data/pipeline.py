"""From records addressed by index to batches addressed by step, read ahead through Grain.

The global batch of step n is a pure function of (seed, n): it does not depend on how many hosts
share it, nor on where a run was resumed.
"""

import dataclasses
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import grain
import numpy as np

from bigjax.data.shuffle import shuffled
from bigjax.experiment import UsageError

Examples = dict[str, np.ndarray]
Uniform = Callable[[int], np.ndarray]
Augment = Callable[[Examples, Uniform], Examples]

# Grain wants a length; this many steps is endless and still leaves int64 room for steps * batch.
ENDLESS = 2**40


class Records(Protocol):
    """A finite set of examples that can be read by number, many at a time."""

    def __len__(self) -> int:
        """Returns the number of examples."""

    def take(self, indices: np.ndarray) -> Examples:
        """Returns the examples numbered `indices` (int64 [n]) as arrays of n rows."""


class Column(Protocol):
    """An array [N, …] of which rows can be had: NumPy's, or one that lies in a file."""

    def __len__(self) -> int:
        """Returns N."""

    def __getitem__(self, index: Any, /) -> np.ndarray:
        """Returns the rows that `index` chooses."""


@dataclasses.dataclass(frozen=True)
class ArrayRecords:
    """Records held in memory, or mapped into it: row i of every array is example i.

    Attributes:
        arrays: name -> array [N, ...].
    """

    arrays: Mapping[str, Column]

    def __post_init__(self):
        sizes = {name: len(array) for name, array in self.arrays.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f'arrays of one set of records differ in length: {sizes}')

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def take(self, indices: np.ndarray) -> Examples:
        return {name: array[indices] for name, array in self.arrays.items()}


def train_batches(
    records: Records,
    *,
    batch: int,
    seed: int,
    augment: Augment | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.MapDataset:
    """Returns the endless training set of batches: element n is this host's rows of step n.

    Every epoch is a fresh shuffle of all records, each used exactly once; epochs stand back to
    back, so a batch may hold the end of one and the start of the next.

    Args:
        records: the training examples.
        batch: rows of the global batch.
        seed: chooses shuffles and augmentation.
        augment: `augment(examples, uniform) -> examples`; `uniform(k)` gives float64 [rows, k] in
            [0, 1), a pure function of (seed, step, row in the global batch, which call this is).
        process_index: which host this is.
        process_count: how many hosts share the batch; host i has rows [i, i + 1) * batch / count.

    Raises:
        UsageError: `batch` is not a multiple of `process_count`, or there are no records.
    """
    check_batch(records, batch, process_count)
    rows = batch // process_count
    source = TrainSource(records, batch, seed, augment, process_index * rows, rows)
    return grain.MapDataset.source(source)


def eval_batches(
    records: Records, *, batch: int, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset:
    """Returns all records once, in order, in ceil(N / batch) batches of equal shape.

    'weight' (float32 [rows]) is 1 for a record and 0 for the padding that fills the last batch:
    zeros, except 'tokens', which are padded with -1.

    Raises:
        UsageError: `batch` is not a multiple of `process_count`, or there are no records.
    """
    check_batch(records, batch, process_count)
    rows = batch // process_count
    return grain.MapDataset.source(EvalSource(records, batch, process_index * rows, rows))


def iterate(
    dataset: grain.MapDataset,
    *,
    start: int = 0,
    stop: int | None = None,
    stack: int | None = None,
    place: Callable[[Examples], Any] | None = None,
    workers: int = 0,
    prefetch: int = 2,
) -> Iterator[Any]:
    """Returns an iterator over elements `start` .. `stop` of `dataset`, read ahead.

    Args:
        dataset: what `train_batches` or `eval_batches` returned.
        start: first element.
        stop: one past the last element; None for all.
        stack: k consecutive batches come as one with a leading axis of k; the last stack is
            shorter where k does not divide `stop - start`. None stacks nothing.
        place: puts a batch on the devices; called in the thread that reads ahead.
        workers: processes that read; 0 reads in that thread, too, which is best for records in
            memory.
        prefetch: elements kept ready (for each worker); 0 reads when asked.
    """
    dataset = dataset[start : len(dataset) if stop is None else stop]
    if stack is not None:
        dataset = dataset.batch(stack)
    stream = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if workers:
        processes = grain.MultiprocessingOptions(
            num_workers=workers, per_worker_buffer_size=max(prefetch, 1)
        )
        stream = stream.mp_prefetch(processes, worker_init_fn=_leave_interrupts)
    if place:
        stream = stream.map(place)
    if prefetch:
        stream = grain.experimental.ThreadPrefetchIterDataset(stream, prefetch_buffer_size=prefetch)
    return iter(stream)


def _leave_interrupts(worker: int, workers: int) -> None:
    """Ctrl-C reaches every process of a terminal; the loop still needs its data to end a step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def check_batch(records: Records, batch: int, process_count: int) -> None:
    """Raises UsageError unless `records` can be cut into batches over `process_count` hosts."""
    if batch < 1 or batch % process_count:
        nearest = max(1, round(batch / process_count)) * process_count
        raise UsageError(
            f'--batch={batch}: must be a positive multiple of the {process_count} processes; '
            f'try --batch={nearest}'
        )
    if not len(records):
        raise UsageError('the data set has no records: nothing to make a batch from')


@dataclasses.dataclass(frozen=True)
class TrainSource:
    """Grain's random-access source of training batches."""

    records: Records
    batch: int
    seed: int
    augment: Augment | None
    first_row: int
    rows: int

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, step: int) -> Examples:
        position = int(step) * self.batch + self.first_row
        indices = shuffled(position, self.rows, len(self.records), seed=self.seed)
        examples = self.records.take(indices)
        if self.augment is None:
            return examples
        return self.augment(examples, Draws(self.seed, int(step), self.first_row, self.rows))


@dataclasses.dataclass(frozen=True)
class EvalSource:
    """Grain's random-access source of evaluation batches."""

    records: Records
    batch: int
    first_row: int
    rows: int

    def __len__(self) -> int:
        return -(-len(self.records) // self.batch)

    def __getitem__(self, number: int) -> Examples:
        size = len(self.records)
        indices = int(number) * self.batch + self.first_row + np.arange(self.rows)
        real = indices < size
        examples = self.records.take(np.minimum(indices, size - 1))
        if not real.all():
            for name, array in examples.items():
                shape = (-1,) + (1,) * (array.ndim - 1)
                fill = np.asarray(-1 if name == 'tokens' else 0, array.dtype)
                examples[name] = np.where(real.reshape(shape), array, fill)
        return {**examples, 'weight': real.astype(np.float32)}


class Draws:
    """Uniform draws for the rows one host holds, equal to those any other split would give them.

    Philox is a function of a key and a counter, so the draws of row r are found without making
    those of the rows before it.
    """

    def __init__(self, seed: int, step: int, first_row: int, rows: int):
        self.seed, self.step, self.first_row, self.rows = seed, step, first_row, rows
        self.calls = 0

    def __call__(self, k: int) -> np.ndarray:
        """Returns float64 [rows, k] in [0, 1)."""
        bits = np.random.Philox(key=self.seed, counter=[0, 0, self.calls, self.step])
        self.calls += 1
        # A counter gives four words, and a draw takes one.
        blocks, words = divmod(self.first_row * k, 4)
        generator = np.random.Generator(bits.advance(blocks))
        return generator.random(words + self.rows * k)[words:].reshape(self.rows, k)
