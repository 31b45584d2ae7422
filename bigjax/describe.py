"""What a run will be, told before anything is allocated or compiled."""

import math
from pathlib import Path
from typing import Any

import jax

from bigjax import metrics, sharding
from bigjax.experiment import Experiment
from bigjax.identity import Identity
from bigjax.state import Setup


def parameters_by_module(params: Any) -> dict[str, int]:
    """Returns the number of parameters below each top-level name of a parameter tree."""
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        module = sharding.path_string(path[:1])
        counts[module] = counts.get(module, 0) + math.prod(leaf.shape)
    return counts


def describe(
    experiment: Experiment, identity: Identity, plan: Setup, workdir: Path
) -> dict[str, Any]:
    """Returns the start-up summary as one JSON-able object; `--action=describe` prints it."""
    task, run = experiment.task, experiment.run
    peak = metrics.peak_flops(jax.devices()[0].device_kind)
    modules = parameters_by_module(plan.abstract.params)
    return {
        'experiment': identity.experiment,
        'knobs': identity.knobs,
        'parameters': plan.parameters,
        'parameters_by_module': modules,
        'flops_per_step': task.flops_per_example * run.batch,
        'batch': run.batch,
        'examples_per_step': run.batch,
        f'{task.unit}_per_step': task.units_per_example * run.batch,
        'steps': run.steps,
        'mesh': dict(plan.mesh.shape),
        'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
        'processes': jax.process_count(),
        'peak_flops': peak and peak * jax.device_count(),
        'state_bytes_per_device': sharding.bytes_per_device(plan.abstract, plan.shardings),
        'data': experiment.data.describe(),
        'workdir': str(workdir),
    }
