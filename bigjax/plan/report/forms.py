"""Figures of a plan as people read them: 24.8 s, 23.2 – 26.5 s, 64.0 days, fsdp=128,tensor=4."""

from collections.abc import Callable, Iterable
from typing import Any

from bigjax import units


def seconds(value: float | None) -> str:
    """A short time with three digits: 24.8 s, 1.24 ms, 3.1 µs; minutes above 1,000 s."""
    if value is None:
        return '–'
    for factor, unit in ((1.0, 's'), (1e-3, 'ms'), (1e-6, 'µs'), (1e-9, 'ns')):
        if abs(value) >= factor * 0.9995:
            return (
                units.duration(value)
                if value >= 1000
                else f'{f"{value / factor:#.3g}".rstrip(".")} {unit}'
            )
    return '0 s' if not value else f'{value / 1e-9:.2g} ns'


def long_time(value: float) -> str:
    """A training time: days above two of them."""
    return f'{value / 86400:,.1f} days' if value >= 2 * 86400 else units.duration(value)


def between(ends: Iterable[float], form: Callable[[float], str]) -> str:
    """A range in one unit: 23.2 – 26.5 s."""
    first, last = sorted(ends)
    left, right = form(first), form(last)
    number, _, unit = left.partition(' ')
    if unit and unit == right.partition(' ')[2]:
        left = number
    return right if left == right.partition(' ')[0] else f'{left} – {right}'


def percent(value: float) -> str:
    """A share: 64.0 %."""
    return f'{100 * value:.1f} %'


def count(value: float) -> str:
    """Chip-hours, or an amount of money: 785,997, but 4.83 where a hundredth matters."""
    return f'{value:,.0f}' if value >= 100 else f'{value:.2f}'


def axes(names: Any) -> str:
    """Mesh axes as they are typed: data+fsdp."""
    return names if isinstance(names, str) else '+'.join(names)


def mesh(sizes: Any) -> str:
    """A mesh as it is typed, without its axes of one device: fsdp=128,tensor=4."""
    if isinstance(sizes, str):
        return sizes
    return ','.join(f'{n}={v}' for n, v in sizes.items() if v > 1) or 'one device'
