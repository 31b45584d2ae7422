"""FLOPs of the matrix products and convolutions that a function traces to."""

import math
from collections.abc import Callable
from typing import Any

import jax


def matrix_flops(function: Callable, *args: Any) -> int:
    """Two for every multiply-add, padding included; arguments may be shapes.

    A loop's body is counted as often as it runs.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        out = math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
        if eqn.primitive.name == 'dot_general':
            (contracted, _), _ = eqn.params['dimension_numbers']
            total += 2 * out * math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
        elif eqn.primitive.name == 'conv_general_dilated':
            kernel, numbers = eqn.invars[1].aval.shape, eqn.params['dimension_numbers']
            total += 2 * out * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
        inner = jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')
        )
        times = eqn.params.get('length', 1) if eqn.primitive.name == 'scan' else 1
        for part in inner:
            part = getattr(part, 'jaxpr', part)
            if hasattr(part, 'eqns'):
                total += times * _count(part)
    return total
