"""Compiles whole training steps for a TPU that need not be there, with and without the kernels.

    python tests/conv_steps.py [--chip=v6e] [--impl=xla,auto,tpu] [STEP …]

Not a test: a step takes minutes to compile. Predicted, not measured, and printed side by side: the
compiler's estimate of everything outside the kernels, the kernels' schedule (see
pallas_kernels/schedule.py), bytes that move between HBM and the core, temporaries, and the copies
that only change a layout.
"""

import argparse
import collections
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from pallas_kernels import schedule_compile, schedule_hlo, schedule_model
from pallas_kernels.chip import TPUS, Chip, named

# What is trained: an experiment and its knobs, those of the published size.
STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    'resnet50': (
        'resnet',
        {'depth': 50, 'dataset': 'digits', 'num_classes': 1000, 'image_size': 224, 'channels': 3,
         'dtype': 'bfloat16', 'batch': 128, 'shift': 0},
    ),
    'wavenet': (
        'wavenet',
        {'depth': 10, 'blocks': 1, 'width': 128, 'gates': 128, 'skip': 128, 'seq': 16384,
         'dtype': 'bfloat16', 'batch': 8},
    ),
}  # fmt: skip
# Two blocks each of networks that no experiment has, whose convolutions have kernels: batch, side
# and channels of the images, kernel and groups of the convolution.
BLOCKS: dict[str, tuple[int, int, int, int, int]] = {
    'convnext blocks': (128, 14, 384, 7, 384),
    'resnext blocks': (32, 56, 256, 3, 32),
}
IMPLS = ('xla', 'auto', 'tpu')
# Dumps of the kernels: their bundles are read, those of all else are told by the compiler.
KERNELS = re.compile(r'\d+-(conv_|stem|depthwise|grouped|causal|sequence|gated)')


class Row(NamedTuple):
    """What a step is predicted to take.

    Attributes:
      outside: seconds of all but the kernels, as the compiler estimates them.
      kernels: seconds of the kernels' schedule.
      count: of the kernels.
      hbm_bytes: moved between HBM and the core.
      temp_bytes: of HBM, besides state and batch.
      copies: instructions that change a layout, and seconds of them, which are in `outside`.
    """

    outside: float
    kernels: float
    count: int
    hbm_bytes: int
    temp_bytes: int
    copies: tuple[int, float]


def built(name: str, impl: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Returns the train step of an experiment, shapes of its state and batch, and no notes."""
    import jax

    from bigjax import experiment, train
    from bigjax.data import pipeline
    from bigjax.state import make_init

    if name in BLOCKS:
        return blocks(name, impl)
    source, knobs = STEPS[name]
    run = experiment.load(source, conv=impl, **knobs)
    state = jax.eval_shape(make_init(run.task, run.optimizer, run.run.seed))
    rows = pipeline.train_batches(run.data.train, batch=run.run.batch, seed=0)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), dict(rows[0]))
    return train.make_train_step(run), (state, batch), {}


def blocks(name: str, impl: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Returns a step of gradient descent on two blocks, shapes of parameters and input, no notes.

    ConvNeXt's block is a depthwise convolution, LayerNorm and an MLP (Liu et al. 2022,
    arXiv:2201.03545); ResNeXt's a grouped convolution between two of 1 x 1, with BatchNorm (Xie et
    al. 2017, arXiv:1611.05431).
    """
    import jax
    import jax.numpy as jnp

    from pallas_kernels.conv import conv2d

    B, H, C, K, groups = BLOCKS[name]
    wide = groups == C  # An MLP of 4 C, else two 1 x 1 convolutions.

    def normed(x_BHWC: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        x = x_BHWC.astype(jnp.float32)
        x = (x - x.mean(axes, keepdims=True)) * jax.lax.rsqrt(x.var(axes, keepdims=True) + 1e-5)
        return x.astype(jnp.bfloat16)

    def convnext(w: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        y = normed(conv2d(x, w['spatial'], groups=groups, impl=own), (3,))
        return x + jax.nn.gelu(y @ w['up']) @ w['down']

    def resnext(w: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        y = jax.nn.relu(normed(x @ w['up'], (0, 1, 2)))
        y = jax.nn.relu(normed(conv2d(y, w['spatial'], groups=groups, impl=own), (0, 1, 2)))
        return jax.nn.relu(x + normed(y @ w['down'], (0, 1, 2)))

    def loss(weights: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
        for w in weights:
            x = (convnext if wide else resnext)(w, x)
        return jnp.mean(jnp.square(x.astype(jnp.float32)))

    def step(weights: list[dict[str, jax.Array]], x: jax.Array) -> tuple[Any, jax.Array]:
        gradients, dx = jax.grad(loss, (0, 1))(weights, x)
        return jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradients), dx

    own = None if impl == 'auto' else impl
    inner = 4 * C if wide else C
    shapes = {'spatial': (K, K, C // groups, C), 'up': (C, inner), 'down': (inner, C)}
    one = {key: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for key, shape in shapes.items()}
    return step, ([one, one], jax.ShapeDtypeStruct((B, H, H, C), jnp.bfloat16)), {}


def row(name: str, impl: str, chip: Chip) -> Row:
    """Compiles a step in a child and predicts it.

    Raises:
      schedule_compile.CompileError: it does not compile.
    """
    with tempfile.TemporaryDirectory(prefix='steps_') as folder:
        command = [sys.executable, __file__, '--child', name, impl, chip.name]
        schedule_compile.run(command, Path(folder), dumps=impl != 'xla')
        for file in Path(folder).iterdir():
            if file.name[0].isdigit() and not KERNELS.match(file.name):
                file.unlink()
        return summed(schedule_compile.read(Path(folder), bare=True), chip)


def summed(compiled: schedule_compile.Compiled, chip: Chip) -> Row:
    """Returns the row of a compiled step."""
    parts = schedule_model.parts_of(compiled, chip)
    kernels = [part for part in parts if part.kernel]
    outside = [part for part in parts if not part.kernel]
    opcodes = collections.Counter()
    copies = 0.0
    for instruction in schedule_hlo.instructions(compiled.module).values():
        opcodes[instruction.opcode] += 1
        if instruction.opcode in ('copy', 'transpose'):
            copies += (instruction.cycles or 0) / chip.clock_hz
    return Row(
        sum(part.estimate_seconds or 0.0 for part in outside),
        sum(part.seconds for part in kernels),
        sum(part.times for part in kernels),
        sum(part.hbm_bytes for part in parts),
        compiled.temp_bytes,
        (opcodes['copy'] + opcodes['transpose'], copies),
    )


def main() -> None:
    """Prints a table of the steps asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--chip', default='v6e', choices=TPUS)
    parser.add_argument('--impl', default=','.join(IMPLS), help=f'of {",".join(IMPLS)}')
    parser.add_argument('steps', nargs='*', help=f'of {", ".join([*STEPS, *BLOCKS])}; default: all')
    given = parser.parse_args()
    if unknown := {*given.steps} - {*STEPS, *BLOCKS} | {*given.impl.split(',')} - {*IMPLS}:
        parser.error(f'{", ".join(sorted(unknown))}: neither a step nor an implementation')
    print(
        '| step | impl | outside ms | kernels ms (number) | both ms | HBM GB | temp GB | copies |'
    )
    print('|---|---|---|---|---|---|---|---|')
    for name in given.steps or [*STEPS, *BLOCKS]:
        for impl in given.impl.split(','):
            try:
                found = row(name, impl, named(given.chip))
            except schedule_compile.CompileError as error:
                print(f'| {name} | {impl} | {error} |', flush=True)
                continue
            copies, seconds = found.copies
            print(
                f'| {name} | {impl} | {1e3 * found.outside:.2f} '
                f'| {1e3 * found.kernels:.2f} ({found.count}) '
                f'| {1e3 * (found.outside + found.kernels):.2f} | {found.hbm_bytes / 1e9:.2f} '
                f'| {found.temp_bytes / 1e9:.2f} | {copies}, {1e3 * seconds:.2f} ms |',
                flush=True,
            )


def child(name: str, impl: str, chip: str, folder: str) -> None:
    """Compiles a step into a folder."""
    # Weights and images keep JAX's layouts; a block's own come and go as its neighbours leave them.
    free = name in BLOCKS
    schedule_compile.into(
        Path(folder), lambda: built(name, impl), named(chip), free=free, donate_argnums=0
    )


if __name__ == '__main__':
    child(*sys.argv[2:]) if sys.argv[1:2] == ['--child'] else main()
