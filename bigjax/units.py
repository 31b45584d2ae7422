"""Numbers as people read them: 1.23 M, 4.5 GiB, 1:02:03."""

import math


def number(value: float) -> str:
    """Three significant digits and a decimal prefix: 123, 1.23 k, 45.6 M, 7.89 G, 1.2 T."""
    if not math.isfinite(value):
        return str(value)
    for factor, prefix in ((1e15, 'P'), (1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if abs(value) >= factor * 0.9995:
            return f'{_three_digits(value / factor)} {prefix}'
    return f'{value:.0f}' if value == round(value) else f'{value:.3g}'


def size(count: float) -> str:
    """Bytes with a binary prefix: 512 B, 1.5 KiB, 3.25 GiB."""
    for factor, unit in ((2**40, 'TiB'), (2**30, 'GiB'), (2**20, 'MiB'), (2**10, 'KiB')):
        if abs(count) >= factor * 0.9995:
            return f'{_three_digits(count / factor)} {unit}'
    return f'{count:.0f} B'


def duration(seconds: float) -> str:
    """0.42 s, 12.3 s, then 1:02 (minutes) and 1:02:03 (hours)."""
    if not math.isfinite(seconds):
        return '?'
    if seconds < 59.95:
        return f'{seconds:.2f} s' if seconds < 10 else f'{seconds:.1f} s'
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{rest:02}' if hours else f'{minutes}:{rest:02}'


def _three_digits(value: float) -> str:
    return f'{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f}'
