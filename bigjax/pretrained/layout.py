"""How another library names and lays out a model's parameters: rules that hold both ways.

Our leaves are named by their path, `params/block_0/mlp/up/kernel`; theirs as in the file. A rule
says which of our axes, in which order, make each axis of theirs.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bigjax.pretrained.files import Index


class Nth(NamedTuple):
    """Stands in `Rule.axes` for an axis that theirs has and ours has not: part i of n.

    Attributes:
      i: which part the leaf is.
      n: how many there are.
    """

    i: int
    n: int


Axes = tuple[tuple['int | Nth', ...], ...]


class Rule(NamedTuple):
    """One tensor of theirs, or a part of it, is one leaf of ours, or a part of it.

    Attributes:
      ours: path of our leaf.
      theirs: name of their tensor.
      axes: for each axis of theirs, our axes that it joins, outermost first; None: as ours.
      at: (axis, i) where our leaf holds several of theirs along an axis: this is the i-th.
      first: whether theirs may have more along its first axis, of which the first are taken.
    """

    ours: str
    theirs: str
    axes: Axes | None = None
    at: tuple[tuple[int, int], ...] = ()
    first: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """One library's way to keep a model.

    Attributes:
      name: what messages call it.
      rules: ordered rules; those whose leaf the model lacks and whose tensor the file lacks, too,
        do not count.
      config: the whole config.json of this model.
      defaults: what their library takes where config.json leaves out a key of `config`.
      same: {key: values that mean what `config` says}.
      told: keys of `config` that say nothing of the architecture.
      normal: their config.json -> the same with what other versions of theirs call otherwise.
      arguments: their config.json -> {flag: value} that fits it.
      prefix: what their names may lack at the front, as a model saved without its head does.
      aliases: (end of a name, what older files have there).
      fresh: regex of our leaves that may start at random where theirs are absent or have another
        shape: heads.
      unused: regex of their tensors that may have no place here: other heads.
      buffers: regex of their tensors that are no parameters, which nobody needs to know of.
    """

    name: str
    rules: tuple[Rule, ...]
    config: Mapping[str, Any]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    same: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    told: tuple[str, ...] = ()
    normal: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: config
    arguments: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}
    prefix: str = ''
    aliases: tuple[tuple[str, str], ...] = ()
    fresh: str = '(?!)'
    unused: str = '(?!)'
    buffers: str = r'num_batches_tracked$'


class Placed(NamedTuple):
    """A rule with the sizes of a model filled in.

    Attributes:
      rule: the rule; its leaf exists.
      sizes: size of every axis of theirs once their joined axes are taken apart.
      wanted: the part of these that is ours.
      groups: how many of these make each of their axes.
      order: for each axis of `sizes`, our axis it is, or None.
    """

    rule: Rule
    sizes: tuple[int, ...]
    wanted: Index
    groups: tuple[int, ...]
    order: tuple[int | None, ...]

    def shape(self) -> tuple[int, ...]:
        """Returns the shape of their tensor."""
        shape, axis = [], 0
        for count in self.groups:
            shape.append(math.prod(self.sizes[axis : axis + count]))
            axis += count
        return tuple(shape)


def place(rule: Rule, shape: tuple[int, ...]) -> Placed:
    """Fills the shape of our leaf into a rule."""
    fixed = dict(rule.at)
    free = [axis for axis in range(len(shape)) if axis not in fixed]
    axes = tuple((axis,) for axis in free) if rule.axes is None else rule.axes
    sizes: list[int] = []
    wanted: list[slice] = []
    order: list[int | None] = []
    for group in axes:
        for part in group:
            if isinstance(part, Nth):
                sizes.append(part.n)
                wanted.append(slice(part.i, part.i + 1))
                order.append(None)
            else:
                sizes.append(shape[part])
                wanted.append(slice(0, shape[part]))
                order.append(part)
    return Placed(rule, tuple(sizes), tuple(wanted), tuple(map(len, axes)), tuple(order))


def resolve(rules: tuple[Rule, ...], shapes: Mapping[str, tuple[int, ...]]) -> tuple[Rule, ...]:
    """Returns the rules with the paths that this model's leaves have.

    Where layers are scanned, `…block_3/…` is number 3 of the leaf `…blocks/…` (see
    `bigjax.nn.stack`), along a leading axis that the others follow.
    """
    return tuple(_stacked(rule) if _stacked(rule).ours in shapes else rule for rule in rules)


def _stacked(rule: Rule) -> Rule:
    match = re.search(r'block_(\d+)/', rule.ours)
    if not match:
        return rule
    axes = rule.axes and tuple(
        tuple(part if isinstance(part, Nth) else part + 1 for part in group) for group in rule.axes
    )
    return rule._replace(
        ours=rule.ours[: match.start()] + 'blocks/' + rule.ours[match.end() :],
        axes=axes,
        at=((0, int(match[1])), *((axis + 1, i) for axis, i in rule.at)),
    )


def one(*axes: int) -> Axes:
    """Returns `Rule.axes` where theirs has axes of one before ours, as [1, 1, C] has."""
    return tuple((Nth(0, 1),) if axis < 0 else (axis,) for axis in axes)


def attention(ours: str, names: Sequence[str]) -> Iterator[Rule]:
    """Yields the rules of self-attention with q, k and v apart there, side by side in ours.

    Args:
      ours: path of our layer, which has `qkv` [C, H, 3, D] and `out` [H, D, C].
      names: of their dense layers for queries, keys, values and the output.
    """
    for i, name in enumerate(names[:3]):
        yield Rule(f'params/{ours}/qkv/kernel', f'{name}.weight', ((1, 3), (0,)), ((2, i),))
        yield Rule(f'params/{ours}/qkv/bias', f'{name}.bias', ((0, 2),), ((1, i),))
    yield from linear(f'{ours}/out', names[3], inputs=2)


def linear(ours: str, theirs: str, *, outputs: int = 1, inputs: int = 1) -> Iterator[Rule]:
    """Yields the rules of a dense layer, which PyTorch keeps as [outputs, inputs].

    Args:
      ours: path of our layer.
      theirs: name of theirs.
      outputs: axes that our kernel's outputs have, and our bias.
      inputs: axes that our kernel's inputs have.
    """
    into = tuple(range(inputs))
    out = tuple(range(inputs, inputs + outputs))
    yield Rule(f'params/{ours}/kernel', f'{theirs}.weight', (out, into))
    yield Rule(f'params/{ours}/bias', f'{theirs}.bias', (tuple(range(outputs)),))


def norm(ours: str, theirs: str) -> Iterator[Rule]:
    """Yields the rules of a LayerNorm or RMSNorm."""
    yield Rule(f'params/{ours}/scale', f'{theirs}.weight')
    yield Rule(f'params/{ours}/bias', f'{theirs}.bias')


def conv(ours: str, theirs: str) -> Iterator[Rule]:
    """Yields the rules of a convolution: theirs is [outputs, inputs, rows, columns]."""
    yield Rule(f'params/{ours}/kernel', f'{theirs}.weight', ((3,), (2,), (0,), (1,)))
    yield Rule(f'params/{ours}/bias', f'{theirs}.bias')


def batch_norm(ours: str, theirs: str) -> Iterator[Rule]:
    """Yields the rules of a BatchNorm; its statistics lie beside the parameters."""
    yield from norm(ours, theirs)
    yield Rule(f'batch_stats/{ours}/mean', f'{theirs}.running_mean')
    yield Rule(f'batch_stats/{ours}/var', f'{theirs}.running_var')


def labels(classes: int) -> dict[str, Any]:
    """Returns what Hugging Face's config.json says of the number of classes: their names."""
    names = [f'LABEL_{n}' for n in range(classes)]
    return {
        'id2label': {str(n): name for n, name in enumerate(names)},
        'label2id': {name: n for n, name in enumerate(names)},
    }
