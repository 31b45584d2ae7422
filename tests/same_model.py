"""Whether a way of training trains the same model: its losses against those of one device.

What is trained is the experiment `llama` (or another decoder's), as `launch.py` builds it, on the
text of this file, byte by byte. No test by itself: `same_losses` is called by tests.
"""

import functools
from typing import Any

import jax
import numpy as np

from bigjax import experiment as experiments
from bigjax import sharding
from bigjax.data import pipeline
from bigjax.experiment import Experiment
from bigjax.nn.stack import stack_layers
from bigjax.state import first_state, setup
from bigjax.strategy import Strategy
from bigjax.train import make_train_step

# Of one step in the loss of 50, in float32; the largest difference seen is in the tests.
TOLERANCE = 1e-5
STEPS = 50
# 16 rows of 16 tokens: two rows for each of eight devices. Four heads, for a tensor axis of 4.
TINY: dict[str, Any] = {
    'depth': 2, 'heads': 4, 'kv_heads': 4, 'width': 32, 'hidden': 64,
    'dataset': f'files:{__file__}', 'tokenizer': 'bytes', 'vocab': 256, 'seq': 16,
    'steps': STEPS, 'batch': 16, 'warmup': 10, 'peak_lr': 1e-3, 'weight_decay': 0.1, 'clip': 1.0,
}  # fmt: skip
# What must not change the losses, so that one device does without it.
HOW = (
    'mesh', 'dcn', 'accumulate', 'steps_per_call', 'offload', 'deterministic',
    *Strategy.__dataclass_fields__,
)  # fmt: skip


def load(name: str, **knobs: Any) -> Experiment:
    """Returns the experiment with the knobs of `TINY` that it has, and others."""
    known = experiments.knobs(experiments.find(name))
    return experiments.load(name, **{k: v for k, v in TINY.items() if k in known} | knobs)


def losses(name: str = 'llama', *, devices: int | None = None, **knobs: Any) -> np.ndarray:
    """Returns the training losses [steps] of an experiment.

    Args:
      name: of the experiment.
      devices: how many it runs on; None takes all.
      knobs: what is not as in `TINY`. Layers start alike, scanned or not.
    """
    made = load(name, **knobs)
    plan = setup(made, jax.devices()[:devices])
    run = made.run
    with jax.set_mesh(plan.mesh):
        state = first_state(made, plan)
        if knobs.get('scan'):
            layers = stack_layers(_first_parameters(name, **knobs))
            state = state._replace(params=jax.device_put(layers, plan.shardings.params))
        dataset = pipeline.train_batches(made.data.train, batch=run.batch, seed=run.seed)
        placed = sharding.batch_sharding(plan.mesh, stacked=True)
        batches = pipeline.iterate(
            dataset,
            stop=run.steps,
            stack=run.steps_per_call,
            place=lambda batch: sharding.shard_batch(batch, placed),
        )
        step = jax.jit(
            make_train_step(made),
            in_shardings=(plan.shardings, None),
            out_shardings=(plan.shardings, sharding.replicated(plan.mesh)),
            donate_argnums=0,
        )
        found = []
        for batch in batches:
            state, metrics = step(state, batch)
            found.append(np.asarray(metrics['loss']))
    return np.concatenate(found)


def _first_parameters(name: str, **knobs: Any) -> Any:
    """Returns the parameters that one device starts with, in layers that are not scanned."""
    made = load(name, **{knob: value for knob, value in knobs.items() if knob not in HOW})
    plan = setup(made, jax.devices()[:1])
    with jax.set_mesh(plan.mesh):
        return jax.device_get(first_state(made, plan).params)


@functools.cache
def _alone(name: str, knobs: tuple[tuple[str, Any], ...]) -> np.ndarray:
    return losses(name, devices=1, **dict(knobs))


def same_losses(
    name: str = 'llama', *, tolerance: float = TOLERANCE, like: dict[str, Any] | None = None,
    **knobs: Any,
) -> None:  # fmt: skip
    """Asserts that eight devices and these knobs give the losses of one device without them.

    Args:
      name: of the experiment.
      tolerance: largest difference of a step's loss, absolute.
      like: knobs of the run on one device; None takes those of `knobs` that say what is learned
        and not how (`HOW`).
      knobs: what is not as in `TINY`, such as `mesh`.
    """
    if like is None:
        like = {knob: value for knob, value in knobs.items() if knob not in HOW}
    expected = _alone(name, tuple(sorted(like.items())))
    assert expected[-1] < expected[0] - 0.5, 'it must learn something'
    np.testing.assert_allclose(losses(name, **knobs), expected, rtol=0, atol=tolerance)
