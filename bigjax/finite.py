"""Stopping at the first step whose loss or gradient is not finite."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from bigjax.sharding import path_string


def stop_if_not_finite(step: int, values: Mapping[str, np.ndarray], params: Any) -> None:
    """Raises FloatingPointError, with step and first bad leaf, unless all is finite."""
    bad = [
        path_string(path)
        for (path, _), finite in zip(
            jax.tree_util.tree_leaves_with_path(params), values['finite'], strict=True
        )
        if not finite
    ]
    if bad or not np.isfinite(values['loss']):
        where = f'gradient of {bad[0]} and {len(bad) - 1} more' if bad else 'no gradient'
        raise FloatingPointError(
            f'step {step}: loss is {values["loss"]:g}; not finite: {where}. The last good '
            f'checkpoint is kept. Try a lower --peak_lr, --clip=1, or --nonfinite=skip.'
        )
