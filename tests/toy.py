"""A tiny experiment with BatchNorm, dropout and augmentation; also a program for child processes.

    python tests/toy.py WORKDIR '{"steps": 8}' ['{"die_at": 5}']

The second object holds arguments of `run`. What came of it is printed as one JSON object.
"""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import numpy as jnp
from jax.experimental import multihost_utils

from bigjax import distributed, experiment, train
from bigjax.data.card import Card
from bigjax.data.pipeline import ArrayRecords
from bigjax.experiment import Data, Experiment, Run
from bigjax.identity import Identity, identity
from bigjax.nn.linear import Dense
from bigjax.optimizers import Optim, make_optimizer
from bigjax.sharding import path_string
from bigjax.tasks.classification import classification

FEATURES, CLASSES = 16, 8
RULES = (
    (r'hidden/kernel$', ('embed', 'mlp')),
    (r'head/kernel$', ('mlp', 'embed')),
    (r'', 'largest'),
)


class Net(nn.Module):
    """Dense, BatchNorm, ReLU, dropout, dense: features [B, F] to logits [B, C]."""

    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BF: jax.Array, *, train: bool) -> jax.Array:
        x_BF = Dense(32, use_bias=False, dtype=self.dtype, name='hidden')(x_BF)
        x_BF = nn.relu(nn.BatchNorm(not train, momentum=0.9, dtype=self.dtype, name='norm')(x_BF))
        x_BF = nn.Dropout(self.dropout, deterministic=not train)(x_BF)
        return Dense(CLASSES, dtype=self.dtype, name='head')(x_BF).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Rows(ArrayRecords):
    """Rows that note which are read, tell so in a file, and may kill their reader.

    Attributes:
      journal: file that gets one line of row numbers a read.
      die_at: how many reads are answered before the process kills itself; 0 is endless.
      delay: seconds a read takes.
    """

    journal: Path | None = None
    die_at: int = 0
    delay: float = 0.0
    reads: list = dataclasses.field(default_factory=list)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        time.sleep(self.delay)
        self.reads.append(indices)
        if self.die_at and len(self.reads) > self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.journal:
            with self.journal.open('a') as file:
                file.write(json.dumps(indices.tolist()) + '\n')
        return super().take(indices)


def rows(count: int, seed: int, **options: Any) -> Rows:
    """Returns rows whose label is the largest of a fixed linear map: learnable."""
    draw = np.random.default_rng(seed)
    features_NF = draw.normal(size=(count, FEATURES)).astype(np.float32)
    map_FC = np.random.default_rng(0).normal(size=(FEATURES, CLASSES))
    label_N = np.argmax(features_NF @ map_FC, -1).astype(np.int32)
    return Rows({'features': features_NF, 'label': label_N}, **options)


def noise(examples: dict[str, np.ndarray], uniform: Any) -> dict[str, np.ndarray]:
    """Augmentation: adds a little to every feature."""
    shift_BF = 0.2 * (uniform(FEATURES) - 0.5).astype(np.float32)
    return {**examples, 'features': examples['features'] + shift_BF}


def toy(
    *,
    dropout: float = 0.1,
    dtype: str = 'float32',
    run: Run = Run(steps=8, batch=16, log_every=1, monitor='test/loss'),  # noqa: B008
    optim: Optim = Optim(schedule='constant', peak_lr=1e-2, warmup=0, ema=0.9),  # noqa: B008
) -> Experiment:
    """Builds the run.

    Args:
      dropout: share of hidden units zeroed in training
      dtype: type of the computation
    """
    optimizer, schedule = make_optimizer(optim, steps=run.steps)
    return Experiment(
        task=classification(
            Net(dropout, jnp.dtype(dtype)),
            inputs='features',
            example=jax.ShapeDtypeStruct((FEATURES,), jnp.float32),
            class_names=tuple('abcdefgh'),
            forward_flops=2 * 32 * (FEATURES + CLASSES),
            unit='rows',
        ),
        optimizer=optimizer,
        schedule=schedule,
        nonfinite=optim.nonfinite,
        # Neither size is a multiple of the batch: epochs and evaluation end raggedly.
        data=Data(train=rows(100, 1), evals={'test': rows(37, 2)}, card=Card('toy', 'A toy.')),
        augment=noise,
        rules=RULES,
        run=run,
    )


def build(**knobs: Any) -> tuple[Experiment, Identity]:
    """Returns the toy with some knobs set, and its identity."""
    return experiment.build(toy, knobs), identity('toy', toy, knobs)


def scored(made: Experiment) -> Experiment:
    """Returns the experiment with its predictions scored: how many rows, and their order."""

    def predict(params: Any, extra: Any, batch: Any) -> dict[str, jax.Array]:
        first = jax.tree.leaves(params)[0].ravel()[0]  # They must be the given ones.
        return {'sum': batch['features'].sum(-1) + 0 * first, 'label': batch['label']}

    def score(pairs: Any) -> dict[str, float]:
        found = list(pairs)
        assert all('weight' not in batch for batch, _ in found)
        right = [np.isclose(out['sum'], batch['features'].sum(-1)) for batch, out in found]
        labels = np.concatenate([outputs['label'] for _, outputs in found])
        return {
            'rows': float(len(labels)),
            'right': float(np.concatenate(right).mean()),
            'order': float(labels @ np.arange(1, len(labels) + 1)),
        }

    def show(batch: Any, outputs: Any) -> list[str]:
        return [f'{a} as {b}' for a, b in zip(batch['label'], outputs['label'], strict=True)]

    return dataclasses.replace(
        made,
        task=made.task._replace(predict=predict),
        score=score,
        score_names=('rows', 'right', 'order'),
        show=show,
    )


def fit(workdir: Path, **knobs: Any) -> train.Outcome:
    """Trains the toy with some knobs set."""
    return train.train(*build(**knobs), workdir)


def leaves(state: Any) -> dict[str, np.ndarray]:
    """Returns every array of a state by its path, on the host, from all processes."""
    gathered = multihost_utils.process_allgather(state, tiled=True)
    named = jax.tree_util.tree_leaves_with_path(gathered)
    return {path_string(path): np.asarray(leaf) for path, leaf in named}


def digest(state: Any) -> str:
    """Returns what two states share if and only if they are equal bit for bit."""
    parts = [(path, x.dtype.str, x.shape, x.tobytes()) for path, x in leaves(state).items()]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def run(
    workdir: Path, knobs: dict[str, Any], *, journal: str = '', scores: bool = False, **options: Any
) -> None:
    """Trains in this process, alone or as one of several; saves the parameters in the end."""
    coordinator, processes, process_id = (
        options.pop(name, None) for name in ('coordinator', 'processes', 'process_id')
    )
    distributed.join(coordinator, processes, process_id, {})
    toy_experiment, identity = build(**knobs)
    toy_experiment = scored(toy_experiment) if scores else toy_experiment
    path = Path(f'{journal}.{jax.process_index()}') if journal else None
    data = dataclasses.replace(toy_experiment.data, train=rows(100, 1, journal=path, **options))
    outcome = train.train(dataclasses.replace(toy_experiment, data=data), identity, workdir)
    params = leaves(outcome.state.params)
    if jax.process_index() == 0:
        np.savez(workdir / 'params.npz', **params)
    state_digest = digest(outcome.state)
    print(json.dumps({'step': outcome.step, 'signal': outcome.signal, 'digest': state_digest}))


def start(
    workdir: Path, knobs: dict[str, Any], *, devices: int = 8, **options: Any
) -> subprocess.Popen:
    """Starts `run` in a child process with so many devices; ends of stdout and stderr are pipes."""
    root = str(Path(__file__).parent.parent)
    environ = {'PYTHONPATH': root, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices)}
    # Compiled as the test itself is (conftest.py), or sums would round in another way.
    environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
    if 'coordinator' in options:  # Else it would listen to the whole network.
        environ['JAX_COORDINATOR_BIND_ADDRESS'] = options['coordinator']
    return subprocess.Popen(
        [sys.executable, __file__, str(workdir), json.dumps(knobs), json.dumps(options)],
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


if __name__ == '__main__':
    run(Path(sys.argv[1]), json.loads(sys.argv[2]), **json.loads((*sys.argv, '{}')[3]))
