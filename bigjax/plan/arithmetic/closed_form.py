"""The plan by arithmetic alone: nothing is compiled or allocated, and no libtpu is needed."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh

from bigjax import sharding
from bigjax.experiment import Experiment
from bigjax.mesh import AXES, parse_mesh
from bigjax.models.decoder import DecoderLM
from bigjax.plan.arithmetic import closed_flops as flops
from bigjax.plan.arithmetic.closed_collectives import collectives
from bigjax.plan.arithmetic.closed_memory import PROGRAM, memory
from bigjax.plan.arithmetic.roofline import efficiency, roofline
from bigjax.plan.arithmetic.shape import Shape, Step, policy, shape_of
from bigjax.plan.arithmetic.traced import gradient_flops
from bigjax.plan.records import CATEGORIES, ClosedForm, Memory
from bigjax.plan.topology import Topology
from bigjax.state import Setup, TrainState, check_pipeline, placed, shapes


def closed_form(
    experiment: Experiment, topology: Topology, abstract: TrainState | None = None
) -> ClosedForm:
    """Returns what a step of an experiment takes on a machine.

    Decoders are known in full. Of all others, operations are those that the gradient traces to,
    memory is that of the state, and notes say what is missing.

    Args:
      experiment: what is to run.
      topology: the machine.
      abstract: what `shapes_on` gives, where that is known: it takes most of the time.

    Raises:
      UsageError: all that a run there would refuse before it compiles.
    """
    run, devices = experiment.run, _mesh(experiment, topology)
    dcn = topology.between(run.dcn, devices.shape)
    if abstract is None:
        abstract = shapes_on(experiment, topology)
    plan = placed(experiment, devices, abstract)
    check_pipeline(experiment, plan)
    model = experiment.model
    if not isinstance(model, DecoderLM):
        return _of_state(experiment, topology, plan)
    experts = bool(model.routing.experts)
    saved, offloaded = policy(model.remat, experts=experts)
    step = Step(
        batch=run.batch,
        length=experiment.task.units_per_example,
        mesh=devices.shape,
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
        slots=_bytes(abstract.opt_state) / _bytes(abstract.params),
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


def shapes_on(experiment: Experiment, topology: Topology) -> TrainState:
    """Returns `bigjax.state.shapes` on a machine; of layers that are not scanned, those of one.

    The others of a decoder are like it, and every one takes as long to trace.
    """
    model, task = experiment.model, experiment.task
    if isinstance(model, DecoderLM) and not model.scan:
        tokens, one = jnp.zeros((1, task.units_per_example), jnp.int32), model.clone(depth=1)
        task = task._replace(init=lambda key: dict(one.init(key, tokens)))
        experiment = dataclasses.replace(experiment, task=task)
    return shapes(experiment, _mesh(experiment, topology))


def _mesh(experiment: Experiment, topology: Topology) -> Mesh:
    """Returns the sizes of the mesh: checks and shardings ask it for no more."""
    sizes = parse_mesh(experiment.run.mesh, topology.devices)
    auto = (AxisType.Auto,) * len(AXES)
    return cast(Mesh, AbstractMesh(tuple(sizes.values()), AXES, axis_types=auto))


def _attention(model: Any) -> str:
    """Returns what a decoder's attention is computed by: kernels, where it takes their arrays."""
    named = model.attention_impl
    heads = shape_of(model).head_dim
    return named if named in ('xla', 'reference') else 'kernel' if heads >= 8 else 'xla'


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _of_state(experiment: Experiment, topology: Topology, plan: Setup) -> ClosedForm:
    """What is known of any experiment: its gradient's operations, and the memory of its state."""
    run, task = experiment.run, experiment.task
    abstract = plan.abstract
    where = sharding.state_shardings(abstract, experiment.rules, plan.mesh)
    parameters = sharding.bytes_per_device(abstract.params, where.params)
    optimizer = sharding.bytes_per_device(abstract.opt_state, where.opt_state)
    away = run.offload == 'optimizer'
    held = dict.fromkeys(CATEGORIES, 0) | {
        'parameters': parameters,
        'optimizer': 0 if away else optimizer,
        'gradients': parameters * (2 if run.accumulate > 1 else 1),
        'other': sharding.bytes_per_device(abstract.extra, where.extra),
        'program': PROGRAM,
    }
    total = float(task.flops_per_example * run.batch)
    sizes = tuple(plan.mesh.shape[axis] for axis in AXES)
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
