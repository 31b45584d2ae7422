"""How far predictions were from published runs: what is printed beside every prediction."""

import functools
import json
from typing import Any

from bigjax.plan.arithmetic.roofline import ROWS
from bigjax.plan.calibration import errors, lines

# Of a generation of which no run is published: the efficiency is a guess, and so is this.
UNKNOWN = 0.4


@functools.cache
def _file() -> dict[str, Any]:
    return json.loads(ROWS.read_text('utf-8'))


def closed_error(hardware: str) -> float:
    """Returns the worst error of the closed form on a generation's published runs, as a share."""
    known = _file()['efficiency'].get(hardware)
    return known['worst'] if known and known['rows'] > 1 else UNKNOWN


def calibration(hardware: str, *, compiled: bool) -> dict[str, Any]:
    """Returns the published rows behind a prediction, and their median and worst error.

    Args:
      hardware: the generation; the closed form is calibrated for each alone.
      compiled: whether the prediction is from a compiled program, the middle of its range.
    """
    if compiled:
        ratios = [line.range[1] for line in lines(_compiled_rows()) if line.range]
        median, worst = errors(ratios) if ratios else (0.0, 0.0)
        return {'rows': len(ratios), 'median_error': median, 'worst_error': worst}
    known = _file()['efficiency'].get(hardware) or {'rows': 0, 'median': 0.0, 'worst': 0.0}
    rows = known['rows'] if known['rows'] > 1 else 0
    return {'rows': rows, 'median_error': known['median'], 'worst_error': known['worst']}


def _compiled_rows() -> list[dict[str, Any]]:
    return [row for row in _file()['rows'] if row.get('compiled')]
