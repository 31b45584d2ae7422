"""Times an op on the device at hand and prints measured beside predicted.

  python -m pallas_kernels.benchmark --shape=8,2048,16,16,128 --causal [--backward]
  python -m pallas_kernels.benchmark --op=conv2d --input=32,56,56,64 --kernel=3,3,64 [--backward]

It runs unchanged on a TPU, on a GPU and, with impl='xla', on a CPU. The prediction is there for a
TPU if libtpu's compiler is (see schedule.py); elsewhere the roofline stands beside the time.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import schedule, schedule_compile, schedule_flags
from pallas_kernels.chip import CHIPS, Chip, current_chip
from pallas_kernels.schedule_ops import module
from pallas_kernels.schedule_work import OURS


def seconds(function: Callable[..., Any], *arguments: jax.Array, repeats: int = 10) -> float:
    """The median time of a call, in seconds, once it is compiled.

    Calls are queued in batches that are long against the cost of waiting for them.
    """
    jax.block_until_ready(function(*arguments))
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    calls = max(1, min(100, int(0.05 / (time.perf_counter() - start))))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            result = function(*arguments)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def measured(case: Any, impl: str | None, repeats: int = 10) -> float:
    """Seconds of a case on the default device."""
    request = {'side': OURS, 'impl': impl, 'case': dataclasses.asdict(case)}
    function, specs, _ = module(case.op).build(request)
    leaves, tree = jax.tree.flatten(specs)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    arrays = [
        jax.random.normal(key, spec.shape, jnp.float32).astype(spec.dtype)
        for key, spec in zip(keys, leaves, strict=True)
    ]
    return seconds(jax.jit(function), *jax.tree.unflatten(tree, arrays), repeats=repeats)


def beside(case: Any, chip: Chip | None) -> str:
    """What is known without running: the prediction for a TPU, else the roofline."""
    if chip is None:
        return 'no prediction: not a chip of the table'
    if chip.is_tpu:
        try:
            found = schedule.predicted(case, chip.name, cache=schedule_compile.default_cache())
        except schedule_compile.CompileError as error:
            return f'no prediction: {error}'
        return f'predicted {1e6 * found["predicted_seconds"]:.1f} µs'
    # The MXU's padding is a TPU's; a GPU's roofline is plain.
    least = module(case.op).work(case, dataclasses.replace(chip, mxu=1))
    return f'roofline {1e6 * least.roofline_seconds(chip):.1f} µs'


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog='pallas_kernels.benchmark', description=__doc__)
    schedule_flags.add(parser)
    parser.add_argument('--impl', help='as in the op; default: that of the device')
    parser.add_argument('--repeats', type=int, default=10)
    args = parser.parse_args(argv)
    case = schedule_flags.case(args)
    chip = current_chip()
    device = jax.devices()[0]
    impl = args.impl
    if chip is None and impl is None:
        impl = 'xla'
        print(f"{device.device_kind}: neither a TPU nor a GPU of the table, so impl='xla' is timed")
    took = measured(case, impl, args.repeats)
    flops = module(case.op).work(case, CHIPS['v5e']).flops  # the same on every chip
    print(
        f'{case} on {device.device_kind}: measured {1e6 * took:.1f} µs '
        f'({flops / took / 1e12:.2f} TFLOP/s), {beside(case, chip)}'
    )


if __name__ == '__main__':
    main()
