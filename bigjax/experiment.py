"""Experiment: what a run is, and how a function under experiments/ becomes one.

An experiment is a function whose keyword-only arguments are its knobs. An argument whose default is
a frozen dataclass (`Run`, `Optim`, …) is a group: each of its fields is a knob, too.
"""

import ast
import dataclasses
import difflib
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:  # Listing experiments and reading flags must not wait for JAX to load.
    import optax

    from bigjax.data.card import Card
    from bigjax.data.pipeline import Augment, Records
    from bigjax.sharding import Rule
    from bigjax.task import Task

EXPERIMENTS = Path(__file__).parent.parent / 'experiments'


class UsageError(ValueError):
    """A mistake in what the user asked for; its message names flag, value, rule and a way out."""


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
      monitor: what "best" means, as SET/METRIC; accuracies are better high, all else low
      patience: evaluations without a better --monitor before training stops early; 0 never stops
      accumulate: microbatches that one step's batch is computed in, to save memory
      steps_per_call: steps scanned in one call of the compiled program; slow for CNNs on a CPU
      mesh: devices per axis, such as data=2,fsdp=2,tensor=2; one axis may be -1 (what is left)
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
    workers: int = 0
    data_dir: str = '~/tensorflow_datasets'
    profile_steps: str = ''

    # A resumed run may change these: they say how long and where it runs, not what it computes.
    FREE: ClassVar[tuple[str, ...]] = (
        'steps', 'eval_batch', 'eval_every', 'save_every', 'log_every', 'keep', 'monitor',
        'patience', 'steps_per_call', 'mesh', 'workers', 'data_dir', 'profile_steps',
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, least in {'steps': 1, 'batch': 1, 'seed': 0, 'eval_batch': 0, 'eval_every': 0,
                            'save_every': 0, 'log_every': 1, 'keep': 1, 'patience': 0,
                            'accumulate': 1, 'steps_per_call': 1,
                            'workers': 0}.items():  # fmt: skip
            if getattr(self, name) < least:
                raise UsageError(
                    f'--{name}={getattr(self, name)}: must be at least {least}; '
                    f'try --{name}={least}'
                )
        for name in ('steps', 'eval_every', 'save_every'):
            if getattr(self, name) % self.steps_per_call:
                near = round(getattr(self, name) / self.steps_per_call) or 1
                raise UsageError(
                    f'--{name}={getattr(self, name)}: must be a multiple of '
                    f'--steps_per_call={self.steps_per_call}; '
                    f'try --{name}={near * self.steps_per_call}'
                )
        first, _, last = self.profile_steps.partition(':')
        digits = first.isdecimal() and last.isdecimal()
        if self.profile_steps and not (digits and int(first) < int(last)):
            raise UsageError(
                f'--profile_steps={self.profile_steps}: must be FIRST:LAST, the first below the '
                f'last; try --profile_steps=10:13'
            )


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
        for name, rule, ok in (
            ('length', 'must be at least 1', self.length >= 1),
            ('samples', 'must be at least 1', self.samples >= 1),
            ('temperature', 'must not be negative', self.temperature >= 0),
            ('top_k', 'must not be negative', self.top_k >= 0),
            ('top_p', 'must be above 0 and at most 1', 0 < self.top_p <= 1),
            ('min_p', 'must be at least 0 and below 1', 0 <= self.min_p < 1),
        ):
            if not ok:
                default = type(self).__dataclass_fields__[name].default
                raise UsageError(f'--{name}={getattr(self, name)}: {rule}; try --{name}={default}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What a run trains and is evaluated on.

    Attributes:
      train: training records.
      evals: evaluation records by the name of their set.
      card: what the data set says of itself.
    """

    train: 'Records'
    evals: 'Mapping[str, Records]'
    card: 'Card'

    def describe(self) -> dict[str, Any]:
        """Returns the card as a JSON-able object."""
        return dataclasses.asdict(self.card)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything `bigjax.train.train` needs, as real objects.

    Attributes:
      task: what is computed; see `bigjax.task`.
      optimizer: the optax chain.
      schedule: step -> learning rate, for the log.
      data: training and evaluation records with their description.
      rules: ordered sharding rules that cover every parameter.
      run: the knobs of the run.
      augment: what training batches go through, if anything.
      sample: how text is generated, for language models.
      tokenizer: text <-> tokens, for language models.
      nonfinite: `'stop'` ends training at a loss or gradient that is not finite; `'skip'` goes on.
    """

    task: 'Task'
    optimizer: 'optax.GradientTransformation'
    schedule: Callable[[Any], Any]
    data: Data
    rules: 'Sequence[Rule]'
    run: Run
    augment: 'Augment | None' = None
    sample: Sample = Sample()
    tokenizer: Any = None
    nonfinite: str = 'stop'


class Knob(typing.NamedTuple):
    """One scalar that a flag sets.

    Attributes:
      default: its value when no flag is given.
      type: `int`, `float`, `bool`, `str`, or a tuple of the strings it may be.
      help: one line.
      group: the function's argument whose field it is, or its own name.
      free: whether a resumed run may change it.
    """

    default: Any
    type: Any
    help: str
    group: str
    free: bool = False


def _files() -> dict[str, Path]:
    return {file.stem: file for file in sorted(EXPERIMENTS.glob('[a-z]*.py'))}


def names() -> dict[str, str]:
    """Returns every experiment's name and first docstring line, without importing any."""
    docs = {n: ast.get_docstring(ast.parse(f.read_text('utf-8'))) for n, f in _files().items()}
    return {name: (doc or '').partition('\n')[0] for name, doc in docs.items()}


def find(name: str) -> Callable[..., Experiment]:
    """Returns the function `experiment` of `experiments/<name>.py`."""
    if name not in _files():
        raise UsageError(
            f'--experiment={name}: there is no experiments/{name}.py; '
            f'try --experiment={difflib.get_close_matches(name, _files(), n=1, cutoff=0)[0]}'
        )
    return importlib.import_module(f'experiments.{name}').experiment


def _help(doc: str | None) -> dict[str, str]:
    """Returns `{name: line}` of a docstring's indented `name: line` entries."""
    return dict(re.findall(r'^ +(\w+): (.+)$', inspect.cleandoc(doc or ''), re.MULTILINE))


def _type(annotation: Any) -> Any:
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    return annotation


def knobs(function: Callable[..., Experiment]) -> dict[str, Knob]:
    """Returns the knobs of an experiment function in the order of its signature.

    Raises:
      TypeError: a knob has no type, default or line of help, or two have one name.
    """
    found: dict[str, Knob] = {}

    def add(name: str, default: Any, source: Any, group: str, free: bool = False) -> None:
        type_, line = typing.get_type_hints(source).get(name), _help(source.__doc__).get(name, '')
        for lacks, what in (
            (type_ is None, 'a type annotation'),
            (default is inspect.Parameter.empty, 'a default'),
            (not line, f'a line "{name}: what it is" in the docstring of {source.__name__}'),
            (name in found, f'a name of its own: {name in found and found[name].group} has it'),
        ):
            if lacks:
                raise TypeError(f'knob {name!r} of {function.__module__} needs {what}')
        found[name] = Knob(default, _type(type_), line, group, free)

    for name, parameter in inspect.signature(function).parameters.items():
        group = parameter.default
        if dataclasses.is_dataclass(group):
            for field in dataclasses.fields(group):
                free = field.name in getattr(group, 'FREE', ())
                add(field.name, getattr(group, field.name), type(group), name, free)
        else:
            add(name, group, function, name)
    return found


def build(function: Callable[..., Experiment], values: Mapping[str, Any]) -> Experiment:
    """Calls an experiment function with knobs given by name, groups put together again."""
    arguments: dict[str, Any] = {}
    grouped: dict[str, dict[str, Any]] = {}
    for name, knob in knobs(function).items():
        if name in values:
            if knob.group == name:
                arguments[name] = values[name]
            else:
                grouped.setdefault(knob.group, {})[name] = values[name]
    defaults = inspect.signature(function).parameters
    for group, fields in grouped.items():
        arguments[group] = dataclasses.replace(defaults[group].default, **fields)
    return function(**arguments)


def load(name: str, **values: Any) -> Experiment:
    """Returns the experiment called `name` with some knobs set, as `launch.py` builds it."""
    function = find(name)
    known = knobs(function)
    if unknown := min(values.keys() - known.keys(), default=None):
        near = difflib.get_close_matches(unknown, known, n=1, cutoff=0)[0]
        raise UsageError(f'--{unknown}: {name} has no such knob; try --{near}')
    return build(function, values)
