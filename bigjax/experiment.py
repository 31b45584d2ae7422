"""Experiment: what a run is, and how a function under experiments/ becomes one.

An experiment is a function whose keyword-only arguments are its knobs. An argument whose default is
a frozen dataclass (`Run`, `Optim`, …) is a group: each of its fields is a knob, too.
"""

import ast
import dataclasses
import difflib
import functools
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bigjax.run import Run, Sample, UsageError

if TYPE_CHECKING:  # Listing experiments and reading flags must not wait for JAX to load.
    import optax

    from bigjax.data.card import Card
    from bigjax.data.pipeline import Augment, Examples, Records
    from bigjax.predict import Predicted
    from bigjax.pretrained.pretrained import Pretrained
    from bigjax.sharding import Rule
    from bigjax.strategy import Strategy
    from bigjax.task import Task

EXPERIMENTS = Path(__file__).parent.parent / 'experiments'


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
        return dataclasses.asdict(self.card) | {'notes': list(self.card.notes)}


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
      score: `score(pairs) -> {name: value}` of one evaluation set; `pairs` yields what
        `task.predict` gave, batch by batch in the order of the records: (the rows of the batch,
        the outputs for these rows), all numpy, padding left out.
      score_names: the names that `score` returns; all are better high.
      show: `show(batch, outputs)` -> one text a row, for the few examples that are shown.
      generate: (params, extra) -> texts of `--action=generate`, where `task.decoder` is not how.
      model: the Linen module of a language model, from which a plan reads what it is made of.
      strategy: how a decoder is computed.
      pretrained: the model's names in other libraries, and the weights that step 0 starts from.
      nonfinite: `'stop'` ends training at a loss or gradient that is not finite; `'skip'` goes on.
    """

    task: 'Task'
    optimizer: 'optax.GradientTransformation'
    schedule: Callable[[Any], Any]
    data: Data
    rules: 'Sequence[Rule]'
    run: Run
    augment: 'Augment | None' = None
    sample: Sample = dataclasses.field(default_factory=Sample)
    tokenizer: Any = None
    score: 'Callable[[Iterator[Predicted]], dict[str, float]] | None' = None
    score_names: tuple[str, ...] = ()
    show: 'Callable[[Examples, Examples], list[str]] | None' = None
    generate: Callable[[Any, Any], list[str]] | None = None
    model: Any = None
    strategy: 'Strategy | None' = None
    pretrained: 'Pretrained | None' = None
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


@functools.cache  # A search asks for each of its candidates.
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
