"""Operations of a function by what it traces to: nothing is compiled, and no array exists."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from bigjax.data import pipeline
from bigjax.experiment import Experiment
from bigjax.mesh import AXES
from bigjax.plan.hardware import Hardware
from bigjax.plan.program.flops import along
from bigjax.plan.program.hlo import Array
from bigjax.plan.program.kernels import Kernel, attention_of
from pallas_kernels.chip import CHIPS


def matrix_flops(function: Callable, *args: Any, padding: bool = False) -> int:
    """Returns the operations of a function's matrix products and convolutions.

    Two for every multiply-add of two elements that exist. A loop's body counts as often as it runs,
    one whose trips are not known once, and of several branches the one that takes most.

    Args:
      function: what is traced.
      *args: its arguments, arrays or their shapes.
      padding: whether products with padding, or with the gaps of a dilated operand, count too.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    # What a rule for a derivative computes without need is no part of any program.
    needed, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(needed, padding)


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


def gradient_flops(
    experiment: Experiment, hardware: Hardware, sizes: tuple[int, ...] = (1,) * len(AXES)
) -> int:
    """Returns the operations of a step's loss and gradient on all devices.

    What is computed again for the gradient counts again. Optimizers are left out, of which few have
    products at all.

    Args:
      experiment: what is trained.
      hardware: whose kernels are taken, if it is a TPU; else layers count in XLA's form.
      sizes: of the mesh, in the order of its axes; on several devices fewer kernels are taken.
    """
    task, key, batch = experiment.task, jax.random.key(0), batch_shapes(experiment)
    extra = dict(jax.eval_shape(task.init, key))
    params = extra.pop('params')

    def loss(params: Any, extra: Any, batch: Any) -> tuple[jax.Array, Any]:
        return task.loss(params, extra, batch, key, True)

    chip = CHIPS.get(hardware.name)
    auto = (AxisType.Auto,) * len(AXES)
    device = AbstractDevice(chip.kind, 1, 'tpu') if chip and chip.is_tpu else None
    mesh = AbstractMesh(sizes, AXES, axis_types=auto, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
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
    if eqn.primitive.name == 'pallas_call':
        return _kernel(eqn, padding)
    return 0


def _inner(eqn: Any, padding: bool) -> int:
    """Operations of the functions that an equation calls."""
    if eqn.primitive.name == 'pallas_call':
        return 0
    found = [
        _count(getattr(part, 'jaxpr', part), padding)
        for part in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')
        )
        if hasattr(getattr(part, 'jaxpr', part), 'eqns')
    ]
    if eqn.primitive.name == 'cond':
        return max(found)
    times = eqn.params['length'] if eqn.primitive.name == 'scan' else 1
    if eqn.primitive.name == 'shard_map':
        # Its shapes are one device's.
        times = math.prod(
            eqn.params['mesh'].shape[axis] for axis in eqn.params['newly_manual_axes']
        )
    return sum(found) * times


def _kernel(eqn: Any, padding: bool) -> int:
    """Operations of attention by the pairs that are seen; of others, of their body at each step."""
    inputs, outputs = (
        tuple(Array(x.aval.dtype.name, x.aval.shape) for x in side)
        for side in (eqn.invars, eqn.outvars)
    )
    causal = (eqn.params['metadata'] or {}).get('causal') != 'False'
    call = attention_of(Kernel(eqn.params['name'], inputs, outputs))
    if call:
        return int(call.flops(causal))
    return math.prod(eqn.params['grid_mapping'].grid) * _count(eqn.params['jaxpr'], padding)


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
