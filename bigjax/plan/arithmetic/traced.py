"""Operations of a function by what it traces to: nothing is compiled, and no array exists."""

import math
from collections.abc import Callable
from typing import Any

import jax

from bigjax.data import pipeline
from bigjax.experiment import Experiment
from bigjax.plan.program.flops import along


def matrix_flops(function: Callable, *args: Any, padding: bool = False) -> int:
    """Returns the operations of a function's matrix products and convolutions.

    Two for every multiply-add of two elements that exist. A loop's body counts as often as it runs,
    one whose trips are not known once, and of several branches the one that takes most.

    Args:
      function: what is traced.
      *args: its arguments, arrays or their shapes.
      padding: whether products with padding, or with the gaps of a dilated operand, count too.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr, padding)


Shapes = dict[str, jax.ShapeDtypeStruct]


def batch_shapes(experiment: Experiment) -> Shapes:
    """Returns the arrays of one step's batch, from what the pipeline makes of two rows."""
    run = experiment.run
    rows = pipeline.train_batches(
        experiment.data.train, batch=2, seed=run.seed, augment=experiment.augment
    )[0]
    return {
        name: jax.ShapeDtypeStruct(
            (run.batch, *array.shape[1:]), jax.dtypes.canonicalize_dtype(array.dtype)
        )
        for name, array in rows.items()
    }


def gradient_flops(experiment: Experiment, batch: Shapes) -> int:
    """Returns the operations of a step's loss and gradient on all devices.

    What is computed again for the gradient counts again. Layers that have a kernel are taken in
    XLA's form. Optimizers are left out, of which few have products at all.

    Args:
      experiment: what is trained.
      batch: shapes of a step's batch, as from `batch_shapes`.
    """
    task, key = experiment.task, jax.random.key(0)
    extra = dict(jax.eval_shape(task.init, key))
    params = extra.pop('params')

    def loss(params: Any, extra: Any, batch: Any) -> tuple[jax.Array, Any]:
        return task.loss(params, extra, batch, key, True)

    return matrix_flops(jax.grad(loss, has_aux=True), params, extra, batch)


def _count(jaxpr: Any, padding: bool) -> int:
    return sum(_own(eqn, padding) + _inner(eqn, padding) for eqn in jaxpr.eqns)


def _own(eqn: Any, padding: bool) -> int:
    """Operations of an equation itself."""
    if eqn.primitive.name == 'dot_general':
        (contracted, _), _ = eqn.params['dimension_numbers']
        depth = math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
        return 2 * math.prod(eqn.outvars[0].aval.shape) * depth
    if eqn.primitive.name == 'conv_general_dilated':
        return _convolution(eqn, padding)
    return 0


def _inner(eqn: Any, padding: bool) -> int:
    """Operations of the functions that an equation calls."""
    found = [
        _count(getattr(part, 'jaxpr', part), padding)
        for part in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')
        )
        if hasattr(getattr(part, 'jaxpr', part), 'eqns')
    ]
    if eqn.primitive.name == 'cond':
        return max(found)
    return sum(found) * (eqn.params['length'] if eqn.primitive.name == 'scan' else 1)


def _convolution(eqn: Any, padding: bool) -> int:
    left, right = (x.aval.shape for x in eqn.invars)
    out, said = eqn.outvars[0].aval.shape, eqn.params
    lhs, rhs, result = said['dimension_numbers']
    # Of a grouped one, the window has the features of one group.
    count = out[result[0]] * out[result[1]] * right[rhs[1]] // said['batch_group_count']
    for i, (before, _) in enumerate(said['padding']):
        taps, outputs = right[rhs[2 + i]], out[result[2 + i]]
        count *= (
            taps * outputs
            if padding
            else along(
                extent=left[lhs[2 + i]],
                taps=taps,
                outputs=outputs,
                stride=said['window_strides'][i],
                before=before,
                apart=said['lhs_dilation'][i],
                taps_apart=said['rhs_dilation'][i],
            )
        )
    return 2 * count
