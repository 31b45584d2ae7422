"""The plan by arithmetic alone: nothing is compiled or allocated, and no libtpu is needed."""

from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from bigjax import sharding
from bigjax.experiment import Experiment
from bigjax.mesh import AXES, parse_dcn, parse_mesh
from bigjax.models.decoder import DecoderLM
from bigjax.plan.arithmetic import closed_flops as flops
from bigjax.plan.arithmetic.closed_collectives import collectives
from bigjax.plan.arithmetic.closed_memory import PROGRAM, memory
from bigjax.plan.arithmetic.roofline import efficiency, roofline
from bigjax.plan.arithmetic.shape import STAGE, Shape, Step, policy, shape_of
from bigjax.plan.arithmetic.traced import gradient_flops
from bigjax.plan.records import CATEGORIES, ClosedForm, Memory
from bigjax.plan.topology import Topology
from bigjax.state import make_init


def closed_form(
    experiment: Experiment, topology: Topology, slots: float | None = None
) -> ClosedForm:
    """Returns what a step of an experiment takes on a machine.

    Decoders are known in full. Of all others, operations are those that the gradient traces to,
    memory is that of the state, and notes say what is missing.

    Args:
      experiment: what is to run.
      topology: the machine.
      slots: what `optimizer_slots` says of it, where that is known: it takes most of the time.

    Raises:
      UsageError: the mesh does not fit the machine, the batch or the model.
    """
    run = experiment.run
    mesh = parse_mesh(run.mesh, topology.devices)
    # Checks and shardings ask a mesh for no more than its sizes.
    devices = cast(Mesh, AbstractMesh(tuple(mesh.values()), AXES))
    sharding.check_batch('batch', run.batch, devices, accumulate=run.accumulate)
    slices = topology.slices if topology.hardware.is_tpu else 1
    dcn = parse_dcn(run.dcn, mesh, slices) if slices > 1 else {}
    model = experiment.model
    if not isinstance(model, DecoderLM):
        return _of_state(experiment, topology, devices)
    _check_model(experiment, devices)
    experts = bool(model.routing.experts)
    saved, offloaded = policy(model.remat, experts=experts)
    step = Step(
        batch=run.batch,
        length=experiment.task.units_per_example,
        mesh=mesh,
        dcn=dcn,
        topology=topology,
        item=jnp.dtype(model.dtype).itemsize,
        saved=saved,
        offloaded=offloaded,
        scan=model.scan,
        accumulate=run.accumulate,
        microbatches=model.microbatches,
        context=model.context,
        matmul=model.matmul,
        attention=_attention(model),
        slots=optimizer_slots(experiment) if slots is None else slots,
        offload=run.offload == 'optimizer',
    )
    return of_step(shape_of(model), step)


def of_step(shape: Shape, step: Step, share: float | None = None) -> ClosedForm:
    """Returns what a step of a decoder takes.

    Args:
      shape: the decoder.
      step: how and where it is computed.
      share: the part of the roofline's rate that is reached; None takes its generation's.
    """
    exchanges = collectives(shape, step)
    bounds = roofline(shape, step, exchanges)
    seconds = max(bounds.values())
    known, source = efficiency(step.topology.hardware.name)
    share = share or known
    return ClosedForm(
        model_flops=flops.model_flops(shape, step.batch, step.length),
        causal_flops=flops.model_flops(shape, step.batch, step.length, causal=True),
        executed_flops=flops.executed_flops(shape, step),
        memory=memory(shape, step),
        collectives=exchanges,
        roofline_seconds=seconds,
        predicted_seconds=seconds / share,
        efficiency=share,
        hbm_bytes=bounds['memory'] * step.topology.hardware.hbm_bytes_per_s,
        bounds=bounds,
        notes=(f'efficiency {share:.0%}: {source}',),
    )


def optimizer_slots(experiment: Experiment) -> float:
    """Returns the bytes of the optimizer's state as a multiple of the parameters', by one layer."""
    model = experiment.model.clone(depth=1)
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']
    state = jax.eval_shape(experiment.optimizer.init, params)
    return _bytes(state) / _bytes(params)


def _attention(model: Any) -> str:
    """Returns what a decoder's attention is computed by: kernels, where it takes their arrays."""
    named = model.attention_impl
    heads = shape_of(model).head_dim
    return named if named in ('xla', 'reference') else 'kernel' if heads >= 8 else 'xla'


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _check_model(experiment: Experiment, devices: Mesh) -> None:
    """Raises UsageError where the mesh does not divide a decoder, which few of its layers tell."""
    model, stages = experiment.model, devices.shape[STAGE]
    model = model if model.depth % stages else model.clone(depth=stages)
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']
    shapes = {
        sharding.path_string(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    sharding.parameter_specs(shapes, experiment.rules, devices)


def _of_state(experiment: Experiment, topology: Topology, devices: Mesh) -> ClosedForm:
    """What is known of any experiment: its gradient's operations, and the memory of its state."""
    run, task = experiment.run, experiment.task
    abstract = jax.eval_shape(make_init(task, experiment.optimizer, run.seed))
    placed = sharding.state_shardings(abstract, experiment.rules, devices)
    parameters = sharding.bytes_per_device(abstract.params, placed.params)
    optimizer = sharding.bytes_per_device(abstract.opt_state, placed.opt_state)
    away = run.offload == 'optimizer'
    held = dict.fromkeys(CATEGORIES, 0) | {
        'parameters': parameters,
        'optimizer': 0 if away else optimizer,
        'gradients': parameters * (2 if run.accumulate > 1 else 1),
        'other': sharding.bytes_per_device(abstract.extra, placed.extra),
        'program': PROGRAM,
    }
    total = float(task.flops_per_example * run.batch)
    sizes = tuple(devices.shape[axis] for axis in AXES)
    executed = gradient_flops(experiment, topology.hardware, sizes) / topology.devices
    hardware = topology.hardware
    state = 6 * parameters + 2 * optimizer
    bounds = {
        'compute': executed / hardware.peak_flops,
        'memory': state / hardware.hbm_bytes_per_s,
    }
    share, source = efficiency(hardware.name)
    return ClosedForm(
        model_flops=total,
        causal_flops=total,
        executed_flops=executed,
        memory=Memory(held, sum(held.values()), optimizer if away else 0),
        collectives=(),
        roofline_seconds=max(bounds.values()),
        predicted_seconds=max(bounds.values()) / share,
        efficiency=share,
        hbm_bytes=state,
        bounds=bounds,
        notes=(
            'only decoders are known in full: without a compiler, activations and collectives are '
            'not in these figures; operations are those that the gradient traces to',
            f'efficiency {share:.0%}, of decoders: {source}',
        ),
    )  # fmt: skip
