"""The knobs of any run: how it goes, how text is made; and the error for what does not fit."""

import dataclasses
from typing import Any, ClassVar, Literal


class UsageError(ValueError):
    """A mistake in what the user asked for; its message names flag, value, rule and a way out."""


def need(holds: bool, knobs: Any, flag: str, rule: str, works: object) -> None:
    """Raises UsageError unless a rule holds for one of a group's knobs; `works` is a good value."""
    if not holds:
        raise UsageError(f'--{flag}={getattr(knobs, flag)}: {rule}; try --{flag}={works}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """How a run goes, whatever it trains.

    Attributes:
      steps: optimizer steps in all
      batch: examples of one step, over all devices and hosts
      seed: seed of initialisation, data order, augmentation and dropout
      eval_batch: examples of one evaluation batch; 0 takes --batch
      eval_every: steps between evaluations; 0 evaluates at the end only
      save_every: steps between checkpoints; 0 saves at the end only
      log_every: steps between logged lines
      keep: latest checkpoints kept, beside the best one
      monitor: what "best" means, as SET/METRIC; low but for accuracy, F1 and scores
      patience: evaluations without a better --monitor before training stops early; 0 never stops
      accumulate: microbatches that one step's batch is computed in, to save memory
      steps_per_call: steps scanned in one call of the compiled program; slow for CNNs on a CPU
      mesh: devices per axis, such as data=2,fsdp=2,tensor=2; one axis may be -1 (what is left)
      dcn: the part of the mesh between slices, such as data=2; empty puts all slices on data
      deterministic: the same bits on 1, 2, 4 or 8 data shards, but of BLEU, F1 and texts; slower
      offload: what waits in the host's memory between its uses: none or optimizer
      workers: processes that prepare data; 0 uses threads
      data_dir: where data sets are prepared and looked for
      profile_steps: FIRST:LAST steps to trace for a profiler; empty traces none
    """

    steps: int
    batch: int
    seed: int = 0
    eval_batch: int = 0
    eval_every: int = 0
    save_every: int = 0
    log_every: int = 10
    keep: int = 2
    monitor: str = 'validation/loss'
    patience: int = 0
    accumulate: int = 1
    steps_per_call: int = 1
    mesh: str = 'data=-1'
    dcn: str = ''
    deterministic: bool = False
    offload: Literal['none', 'optimizer'] = 'none'
    workers: int = 0
    data_dir: str = '~/tensorflow_datasets'
    profile_steps: str = ''

    # A resumed run may change these: they say how long and where it runs, not what it computes.
    FREE: ClassVar[tuple[str, ...]] = (
        'steps', 'eval_batch', 'eval_every', 'save_every', 'log_every', 'keep', 'monitor',
        'patience', 'steps_per_call', 'mesh', 'dcn', 'offload', 'workers', 'data_dir',
        'profile_steps',
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, least in {'steps': 1, 'batch': 1, 'seed': 0, 'eval_batch': 0, 'eval_every': 0,
                            'save_every': 0, 'log_every': 1, 'keep': 1, 'patience': 0,
                            'accumulate': 1, 'steps_per_call': 1,
                            'workers': 0}.items():  # fmt: skip
            need(getattr(self, name) >= least, self, name, f'must be at least {least}', least)
        for name in ('steps', 'eval_every', 'save_every'):
            times = round(getattr(self, name) / self.steps_per_call) or 1
            rule = f'must be a multiple of --steps_per_call={self.steps_per_call}'
            whole = getattr(self, name) % self.steps_per_call == 0
            need(whole, self, name, rule, times * self.steps_per_call)
        first, _, last = self.profile_steps.partition(':')
        digits = first.isdecimal() and last.isdecimal()
        fits = not self.profile_steps or (digits and int(first) < int(last))
        rule = 'must be FIRST:LAST, the first below the last'
        need(fits, self, 'profile_steps', rule, '10:13')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """How text is generated.

    Attributes:
      prompt: text to go on from
      length: tokens to generate
      samples: how many texts
      temperature: divides the logits; 0 takes the likeliest token
      top_k: draw from the k likeliest tokens only; 0 is off
      top_p: draw from the likeliest tokens that hold this much probability; 1 is off
      min_p: leave out tokens less likely than this share of the likeliest one's; 0 is off
      sample_seed: seed of the draws
    """

    prompt: str = '\n'
    length: int = 400
    samples: int = 1
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    sample_seed: int = 0

    FREE: ClassVar[tuple[str, ...]] = (
        'prompt', 'length', 'samples', 'temperature', 'top_k', 'top_p', 'min_p', 'sample_seed',
    )  # fmt: skip

    def __post_init__(self) -> None:
        need(self.length >= 1, self, 'length', 'must be at least 1', 400)
        need(self.samples >= 1, self, 'samples', 'must be at least 1', 1)
        need(self.temperature >= 0, self, 'temperature', 'must not be negative', 0.8)
        need(self.top_k >= 0, self, 'top_k', 'must not be negative', 0)
        need(0 < self.top_p <= 1, self, 'top_p', 'must be above 0 and at most 1', 1.0)
        need(0 <= self.min_p < 1, self, 'min_p', 'must be at least 0 and below 1', 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """How a text is turned into another one.

    Attributes:
      prompt: text that --action=generate translates (or summarizes)
      beam: open texts of the beam search; 1 takes the likeliest token each time
      length_penalty: exponent of the length by which a text's log-probability is divided
    """

    prompt: str = 'Save the changes'
    beam: int = 4
    length_penalty: float = 0.6

    FREE: ClassVar[tuple[str, ...]] = ('prompt', 'beam', 'length_penalty')

    def __post_init__(self) -> None:
        need(self.beam >= 1, self, 'beam', 'must be at least 1', 4)
        fits = 0 <= self.length_penalty <= 10
        need(fits, self, 'length_penalty', 'must be from 0 to 10', 0.6)
