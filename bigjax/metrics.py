"""What a run records while it trains: progress bar, metrics.jsonl, TensorBoard, and time by use.

Every number in metrics.jsonl is finite or null, so that strict JSON parsers read it.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
from tqdm import tqdm

from bigjax import units

# Dense bfloat16 peak of one JAX device in FLOP/s; the longest prefix of its device_kind decides.
PEAK_FLOPS = {
    'TPU v4': 275e12,  # cloud.google.com/tpu/docs/v4
    'TPU v5 lite': 197e12,  # cloud.google.com/tpu/docs/v5e
    'TPU v5e': 197e12,
    'TPU v5': 459e12,  # cloud.google.com/tpu/docs/v5p
    'TPU v6': 918e12,  # cloud.google.com/tpu/docs/v6e
    'TPU7x': 2307e12 / 2,  # cloud.google.com/tpu/docs/tpu7x: per chip, which is two devices
    'NVIDIA A100': 312e12,  # A100 data sheet, without sparsity, as all below
    'NVIDIA H100': 989.4e12,  # H100 data sheet, SXM5
    'NVIDIA H100 PCIe': 756e12,  # H100 PCIe data sheet
    'NVIDIA H100 NVL': 835.5e12,  # H100 NVL data sheet
    'NVIDIA H200': 989.4e12,  # H200 data sheet, SXM
    'NVIDIA H200 NVL': 835.5e12,  # H200 data sheet, NVL
    'NVIDIA B200': 2250e12,  # DGX B200 data sheet: 36 PFLOP/s with sparsity over 8 GPUs
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device, or None where it is not known (every CPU)."""
    known = [kind for kind in PEAK_FLOPS if device_kind.startswith(kind)]
    return PEAK_FLOPS[max(known, key=len)] if known else None


class TimeSplit:
    """Accounts every wall second since its creation to exactly one use.

    `with split('evaluation'): …` charges the block; a block inside a block is taken out of the
    outer one; what is in no block is 'other'. Costs under a microsecond a block.
    """

    USES = ('compile', 'step', 'input', 'checkpoint', 'evaluation', 'other')

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._seconds = dict.fromkeys(self.USES, 0.0)
        self._stack = ['other']
        self._mark = clock()

    def __call__(self, use: str) -> 'TimeSplit':
        if use not in self._seconds:
            raise ValueError(f'no use of time is called {use}; there are {", ".join(self.USES)}')
        self._charge()
        self._stack.append(use)
        return self

    def __enter__(self) -> 'TimeSplit':
        return self

    def __exit__(self, *_) -> None:
        self._charge()
        self._stack.pop()

    def charge(self, use: str) -> None:
        """Charges the time since the last block began or ended to `use`, known only afterwards."""
        now = self._clock()
        self._seconds[use] += now - self._mark
        self._mark = now

    def _charge(self) -> None:
        self.charge(self._stack[-1])

    def seconds(self) -> dict[str, float]:
        """Seconds by use so far, this block included; they sum to the time since the start."""
        self._charge()
        return dict(self._seconds)

    def training(self) -> float:
        """Seconds in which steps could run: all but compilation, checkpoints and evaluation."""
        seconds = self.seconds()
        return seconds['step'] + seconds['input'] + seconds['other']

    def summary(self) -> str:
        """One line: the total and each use that took time, largest first."""
        seconds = self.seconds()
        total = sum(seconds.values())
        parts = sorted(seconds.items(), key=lambda item: -item[1])
        uses = ', '.join(
            f'{use} {units.duration(spent)} ({spent / total:.1%})' for use, spent in parts if spent
        )
        return f'time {units.duration(total)}: {uses}'


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a metrics.jsonl in order; what a kill left half-written is passed over."""
    if not path.exists():
        return
    with path.open(encoding='utf-8', errors='replace') as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and 'step' in record and line.endswith('\n'):
                yield record


def truncate_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Drops what came after `step` (everything if it is 0), atomically; returns the rest."""
    if not path.exists():
        return []
    kept = [record for record in read_metrics(path) if 0 < step >= record['step']]
    temporary = path.with_suffix('.tmp')
    temporary.write_text(''.join(json.dumps(record) + '\n' for record in kept), encoding='utf-8')
    os.replace(temporary, path)
    return kept


def _fetch(metrics: Mapping[str, Any]) -> dict[str, float]:
    # One transfer for all; a list, because dicts come back with their keys sorted.
    return dict(zip(metrics, map(float, jax.device_get(list(metrics.values()))), strict=True))


class Writer:
    """Writes one run's metrics to a progress bar (or plain lines), metrics.jsonl and TensorBoard.

    Between logged steps a call only counts. A logged step is the first one seen, each that reaches
    a new multiple of log_every, and the last. Rates leave out compilation, checkpoints and
    evaluation as accounted by `split`. MFU is model FLOPs over the dense bfloat16 peak of all
    devices, whatever the compute type.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        steps: int,
        log_every: int,
        unit: str,
        units_per_step: int,
        flops_per_step: float | None = None,
        peak: float | None = None,
        resume_step: int = 0,
        split: TimeSplit | None = None,
        active: bool = True,
        stream: TextIO | None = None,
    ):
        """Opens the run's files, dropping what they hold beyond resume_step.

        Args:
            workdir: existing directory of the run.
            steps: updates in the whole run.
            log_every: steps between logged steps.
            unit: what is counted, 'tokens' or 'images'; names the rate 'tokens_per_second'.
            units_per_step: how many of them one step consumes, on all devices.
            flops_per_step: model FLOPs of one step on all devices, for MFU.
            peak: FLOP/s of all devices together (peak_flops times their number); None = no MFU.
            resume_step: updates already done, 0 for a new run.
            split: the run's time accounts.
            active: False on every process but one: then nothing is written or fetched.
            stream: where people read, standard error by default; plain lines if no terminal.
        """
        self._steps, self._log_every, self._unit = steps, log_every, unit
        self._units_per_step, self._flops, self._peak = units_per_step, flops_per_step, peak
        self._split = split or TimeSplit()
        self._active = active
        self._last = resume_step
        self._first: tuple[int, float] | None = None
        self._mark: tuple[int, float] | None = None
        self._event_writer: Any = None
        self._bar: tqdm | None = None
        if not active:
            return
        self._workdir = Path(workdir)
        self._resume_step = resume_step
        path = self._workdir / 'metrics.jsonl'
        kept = truncate_metrics(path, resume_step)
        # An evaluation at the very step that was saved may or may not come again after a resume.
        self._evaluated = {(r['step'], r['set']) for r in kept if 'set' in r}
        self._file = path.open('a', encoding='utf-8')
        self._stream = stream or sys.stderr
        if self._stream.isatty():
            self._bar = tqdm(
                total=steps,
                initial=resume_step,
                file=self._stream,
                dynamic_ncols=True,
                smoothing=0.1,
                bar_format='{percentage:3.0f}% {bar} {n_fmt}/{total_fmt}{postfix}, ETA {remaining}',
            )

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of update number `step` (from 1): scalars, or arrays of shape ().

        Call it after the next step was dispatched: fetching waits for the arrays handed over.
        """
        if not self._active:
            return
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        first = self._first is None
        due = first or step // self._log_every > self._last // self._log_every
        if due or step == self._steps:
            self._log(step, _fetch(metrics))
            self._last = step
        if first:
            # Its end is the first moment that follows a finished step: rates count from here.
            self._first = (step, time.perf_counter())

    def _log(self, step: int, metrics: Mapping[str, float]):
        values = dict(metrics)
        now = self._split.training()
        if self._mark is not None and step > self._mark[0]:
            steps_per_second = (step - self._mark[0]) / max(now - self._mark[1], 1e-9)
            values[f'{self._unit}_per_second'] = steps_per_second * self._units_per_step
            if self._flops and self._peak:
                values['mfu'] = steps_per_second * self._flops / self._peak
        self._mark = (step, now)
        self._record({'step': step}, values, 'train')
        text = self._describe(values)
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        else:
            text = f'step {step}/{self._steps}  {text}'
            if step < self._steps and self._first is not None and step > self._first[0]:
                spent = time.perf_counter() - self._first[1]
                left = spent * (self._steps - step) / (step - self._first[0])
                text += f', ETA {units.duration(left)}'
            self.note(text)

    def _describe(self, values: Mapping[str, float]) -> str:
        rate = f'{self._unit}_per_second'
        forms = (
            ('loss', lambda v: f'loss {v:.4f}'),
            ('learning_rate', lambda v: f'learning rate {v:.2e}'),
            (rate, lambda v: f'{units.number(v)} {self._unit}/s'),
            ('mfu', lambda v: f'MFU {v:.1%}'),
        )
        return ', '.join(form(values[name]) for name, form in forms if name in values)

    def evaluation(self, step: int, set_name: str, metrics: Mapping[str, Any]) -> None:
        """Records the metrics of one evaluation of the data set `set_name` after update `step`."""
        if not self._active or (step, set_name) in self._evaluated:
            return
        self._evaluated.add((step, set_name))
        values = _fetch(metrics)
        self._record({'step': step, 'set': set_name}, values, set_name)
        text = ', '.join(f'{name.replace("_", " ")} {v:.4f}' for name, v in values.items())
        self.note(f'step {step}/{self._steps}  {set_name}: {text}')

    def note(self, text: str) -> None:
        """Shows a line of text to the person watching, above the bar if there is one."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def _record(self, head: dict, values: Mapping[str, float], prefix: str):
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({**head, **finite}, allow_nan=False) + '\n')
        self._file.flush()
        if self._event_writer is None:
            from tensorboardX import SummaryWriter  # only here: start-up should not wait for it

            # Makes TensorBoard forget what an earlier process wrote beyond the resumed step.
            purge = self._resume_step + 1 if self._resume_step else None
            self._event_writer = SummaryWriter(str(self._workdir / 'tensorboard'), purge_step=purge)
        for name, value in finite.items():
            if value is not None:
                self._event_writer.add_scalar(f'{prefix}/{name}', value, head['step'])

    def close(self) -> None:
        """Ends the bar and closes the files; may be called twice."""
        if not self._active:
            return
        self._active = False
        if self._bar is not None:
            self._bar.close()
        self._file.close()
        if self._event_writer is not None:
            self._event_writer.close()

    def __enter__(self) -> 'Writer':
        return self

    def __exit__(self, *_) -> None:
        self.close()
