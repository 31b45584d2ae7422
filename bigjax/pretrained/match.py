"""Which tensor of a file goes where in a model; what does not fit is named leaf by leaf."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from bigjax.pretrained.files import Weights, itemsize
from bigjax.pretrained.layout import Layout, Placed, Rule, place, resolve
from bigjax.run import UsageError

_SHOWN = 20  # lines of one message


@dataclasses.dataclass(frozen=True)
class Match:
    """What a file gives to a model.

    Attributes:
      parts: {path of our leaf: the rules that fill it}.
      names: {name of theirs in the rules: in the file}.
      notes: what is left out or starts at random, one line each.
    """

    parts: Mapping[str, list[Placed]]
    names: Mapping[str, str]
    notes: tuple[str, ...]


def match(
    weights: Weights, layouts: tuple[Layout, ...], shapes: Mapping[str, tuple[int, ...]]
) -> Match:
    """Returns which tensor goes where, in the layout that shares most names with the file.

    Args:
      weights: the folder or file.
      layouts: ways in which this model may be kept.
      shapes: {path: shape} of every leaf of ours.

    Raises:
      UsageError: its config.json is another architecture's, or a leaf is missing, unexpected, of
        another shape or of a type that is not read.
    """
    found = [_names(weights, layout) for layout in layouts]
    best = max(range(len(layouts)), key=lambda n: len(found[n]))
    layout, names = layouts[best], found[best]
    rules = resolve(layout.rules, shapes)
    if not names:
        theirs, ours = sorted(weights.tensors), sorted({rule.theirs for rule in rules})
        raise UsageError(
            f'--pretrained={weights.path}: holds no tensor of {layout.name}: it has '
            f'{_few(theirs)}, where {_few(ours)} are looked for; '
            f'give a folder or file of this family'
        )
    wrong = _config_differences(weights.config, layout)
    parts, problems, notes = _leaves(weights, layout, rules, names, shapes)
    wrong += problems
    if wrong:
        raise UsageError(_message(weights, layout, wrong))
    return Match(parts, names, tuple(notes))


def _few(names: list[str]) -> str:
    return ', '.join(names[:3]) + (', …' if len(names) > 3 else '')


def _names(weights: Weights, layout: Layout) -> dict[str, str]:
    """Returns {name in the rules: name in the file} of all that is there."""
    found = {}
    for rule in layout.rules:
        names = [rule.theirs, rule.theirs.removeprefix(layout.prefix)]
        for new, old in layout.aliases:
            names += [re.sub(f'{re.escape(new)}$', old, name) for name in names[:2]]
        if there := [name for name in names if name in weights.tensors]:
            found[rule.theirs] = there[0]
    return found


def _config_differences(config: Mapping[str, Any], layout: Layout) -> list[str]:
    """Returns a line for every key of config.json that describes another architecture."""
    if 'model_type' not in layout.config or 'model_type' not in config:
        return []  # a single file, or the config.json of another library
    config, lines = layout.normal(config), []
    for key, ours in layout.config.items():
        if key in layout.told:
            continue
        theirs = config.get(key, layout.defaults.get(key))
        ours = list(ours) if isinstance(ours, tuple) else ours
        if theirs != ours and theirs not in layout.same.get(key, ()):
            lines.append(f'config.json: {key} is {theirs} there, {ours} here')
            if key == 'model_type':
                return lines
    return lines


def _leaves(
    weights: Weights,
    layout: Layout,
    rules: tuple[Rule, ...],
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[dict[str, list[Placed]], list[str], list[str]]:
    """Returns what fills each leaf, what is wrong, and what a person should know."""
    parts: dict[str, list[Placed]] = {}
    absent: dict[str, list[tuple[str, str]]] = {}  # leaf -> (kind, why theirs does not fill it)
    notes, taken = [], set()
    for rule in rules:
        if rule.ours not in shapes:
            continue
        name = names.get(rule.theirs)
        taken.add(name)
        placed = place(rule, shapes[rule.ours])
        if name is None:
            absent.setdefault(rule.ours, []).append(('missing', f'{rule.theirs} is not there'))
            continue
        stored, wanted = weights.tensors[name], placed.shape()
        if not itemsize(stored):
            absent.setdefault(rule.ours, []).append(('type', f'{name} is {stored.dtype}'))
        elif rule.first and _longer(stored.shape, wanted):
            notes.append(f'{rule.ours}: the first {wanted[0]} of {stored.shape[0]} rows')
            parts.setdefault(rule.ours, []).append(_lengthened(placed, stored.shape[0]))
        elif stored.shape != wanted:
            why = f'{name} is {stored.shape} there, {wanted} here'
            absent.setdefault(rule.ours, []).append(('shape', why))
        else:
            parts.setdefault(rule.ours, []).append(placed)
    problems = []
    for path in shapes:
        reasons = absent.get(path, [])
        if not reasons and path not in parts:
            reasons = [('missing', 'no tensor of theirs is this')]
        if reasons and re.search(layout.fresh, path):
            parts.pop(path, None)
            notes.append(f'{path} starts at random: {"; ".join(text for _, text in reasons)}')
        else:
            problems += [f'{kind}: {path}: {text}' for kind, text in reasons]
    left = [n for n in weights.tensors if n not in taken and not re.search(layout.buffers, n)]
    problems += [f'unexpected: {n}' for n in left if not re.search(layout.unused, n)]
    unused = [name for name in left if re.search(layout.unused, name)]
    if unused:
        notes.append(f'not used: {_few(unused)}')
    return parts, problems, notes


def _longer(stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return stored[1:] == wanted[1:] and stored[0] > wanted[0]


def _lengthened(placed: Placed, length: int) -> Placed:
    # The first axis of theirs is one of ours here, and no join of several.
    return placed._replace(sizes=(length, *placed.sizes[1:]))


def _message(weights: Weights, layout: Layout, wrong: list[str]) -> str:
    fits = layout.arguments(weights.config) if weights.config else {}
    flags = ' '.join(f'--{flag}={value}' for flag, value in fits.items())
    more = [f'… and {len(wrong) - _SHOWN} more'] if len(wrong) > _SHOWN else []
    text = '\n  '.join((*wrong[:_SHOWN], *more))
    way_out = f'try {flags}' if flags else 'use the knobs it was made with, or another one'
    return f'--pretrained={weights.path}: does not fit this {layout.name}:\n  {text}\n{way_out}'
