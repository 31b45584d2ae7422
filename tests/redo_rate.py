"""How often the TPU forward kernel would do a chunk of queries again, in models trained here.

    python tests/redo_rate.py [--workdir=DIR] [--minilm=DIR]

trains a few transformers for a while by `launch.py`, keeping checkpoints on the way, reads the
queries and keys of every attention call from them, and computes what the kernel looks at: the sum
of weights, each relative to the maximum that it took from the first keys. A sum of 2^60 sends a
chunk of 256 queries to the slow path (`pallas_kernels/attention/tpu/forward_kernel.py`); what that
costs, `python -m pallas_kernels.schedule --slow_path` tells. A run that is in --workdir is not
repeated. --minilm adds published weights (see experiments/bert.py), tuned a little.

Legend: B batch, T queries, S keys, H and K query and key-value heads, D size of a head.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bigjax import experiment as experiments  # noqa: E402
from bigjax.checkpoint import Checkpoints  # noqa: E402
from bigjax.data import pipeline  # noqa: E402
from bigjax.state import setup  # noqa: E402
from pallas_kernels import attention as kernels  # noqa: E402
from pallas_kernels.attention import reference  # noqa: E402
from pallas_kernels.attention.arguments import check_arguments  # noqa: E402
from pallas_kernels.attention.tpu.forward_edges import REDO  # noqa: E402
from pallas_kernels.attention.tpu.forward_kernel import LIMIT  # noqa: E402

RUNS = {
    'gpt_stdlib': '--seq=512 --batch=4 --eval_batch=64 --steps=400',
    'llama': '--depth=4 --width=128 --heads=4 --kv_heads=2 --vocab=4096 '
    '--seq=256 --batch=4 --eval_batch=64 --steps=400 --warmup=40 --peak_lr=2e-3',
    'vit': '--dataset=digits --steps=400',
    'bert': '--steps=200',
}
MINILM = (
    '--objective=classify --dataset=docstrings --seq=32 --pool=mean --dropout=0.1 --steps=20 '
    '--warmup=2 --peak_lr=3e-4 --pretrained='
)


def train(experiment: str, flags: str, workdir: Path) -> None:
    """Trains, keeping a checkpoint of every quarter."""
    if (workdir / 'done').exists():
        return
    steps = int(flags.split('--steps=')[1].split()[0])
    more = f'--save_every={steps // 4} --keep=8 --eval_every=0 --workdir={workdir}'
    command = [
        sys.executable,
        'launch.py',
        f'--experiment={experiment}',
        *flags.split(),
        *more.split(),
    ]
    subprocess.run(
        command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    (workdir / 'done').touch()


def calls(name: str, workdir: Path) -> dict[int, list[tuple[Any, ...]]]:
    """The arguments of every attention call of one evaluation batch, by checkpoint."""
    knobs = json.loads((workdir / 'run.json').read_text())['knobs']
    experiment = experiments.build(experiments.find(name), knobs)
    plan = setup(experiment)
    checkpoints = Checkpoints(workdir, keep=experiment.run.keep)
    records = next(iter(experiment.data.evals.values()))
    batch = next(iter(pipeline.iterate(pipeline.eval_batches(records, batch=4), stop=1)))
    batch = jax.tree.map(jnp.asarray, batch)
    found: dict[int, list[tuple[Any, ...]]] = {}
    real = kernels.attention
    for step in checkpoints.steps():
        state, _ = checkpoints.restore(step, plan.abstract, plan.shardings)
        seen = found[step] = []

        def watched(q, k, v, *, impl, seen=seen, **features):
            seen.append((q, k, features))
            return real(q, k, v, impl=impl, **features)

        with jax.disable_jit(), mock.patch.object(kernels, 'attention', watched):
            experiment.task.loss(state.params, state.extra, batch, jax.random.key(0), False)
    return found


def sums(q_BTHD: Any, k_BSKD: Any, features: dict[str, Any]) -> np.ndarray:
    """log2 of every query's sum of weights relative to the kernel's first maximum, [B, H, T].

    -inf for a query that sees nothing, inf for one that saw none of the keys it started with.
    """
    operands, spec = check_arguments(q_BTHD, k_BSKD, k_BSKD, **features)
    z_BHTS = jnp.where(
        reference.visible(operands, spec), reference.logits(operands, spec), -jnp.inf
    )
    z_BHTS = np.asarray(z_BHTS, np.float64) * np.log2(np.e)
    sparse = operands.segment_ids_BT is not None or spec.left is not None
    if sparse and operands.mask_BHTS is None and operands.bias_BHTS is None:
        m_BHT1 = np.diagonal(z_BHTS, axis1=2, axis2=3)[..., None]
    else:
        aside = [x for x in (operands.mask_BHTS, operands.bias_BHTS) if x is not None]
        tiles = any(x.shape[2] > 1 and x.shape[3] > 1 for x in aside)
        m_BHT1 = z_BHTS[..., : 128 if tiles else 16].max(-1, keepdims=True)
    top_BHT1 = z_BHTS.max(-1, keepdims=True)
    with np.errstate(invalid='ignore', divide='ignore'):
        l_BHT = np.log2(np.exp2(z_BHTS - top_BHT1).sum(-1)) + (top_BHT1 - m_BHT1)[..., 0]
    return np.where(np.isfinite(top_BHT1[..., 0]), l_BHT, -np.inf)


def redone(l_BHT: np.ndarray) -> np.ndarray:
    """Which chunks of queries take the slow path."""
    wrong_BHT = l_BHT >= np.log2(LIMIT)
    return np.stack([wrong_BHT[..., t : t + REDO].any(-1) for t in range(0, l_BHT.shape[2], REDO)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--workdir', type=Path, default=Path(tempfile.gettempdir()) / 'redo_rate')
    parser.add_argument('--minilm', default='')
    args = parser.parse_args()
    runs = {**RUNS, **({'bert MiniLM': MINILM + args.minilm} if args.minilm else {})}
    print('| model | step | attention calls | largest log2 of a sum | chunks done again |')
    print('|---|---|---|---|---|')
    for name, flags in runs.items():
        workdir = args.workdir / name.replace(' ', '_')
        train(name.split()[0], flags, workdir)
        for step, found in calls(name.split()[0], workdir).items():
            all_sums = [sums(*call) for call in found]
            largest = max(l_BHT.max() for l_BHT in all_sums)
            chunks = np.concatenate([redone(l_BHT).ravel() for l_BHT in all_sums])
            print(
                f'| {name} | {step} | {len(found)} | {largest:.1f} | '
                f'{chunks.sum()} of {chunks.size} |',
                flush=True,
            )


if __name__ == '__main__':
    main()
