"""Times attention on the device at hand and prints measured beside predicted.

  python -m pallas_kernels.benchmark --shape=8,2048,16,16,128 --causal [--backward]

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

from pallas_kernels import schedule_compile, schedule_model
from pallas_kernels.attention import attention
from pallas_kernels.chip import Chip, current_chip
from pallas_kernels.schedule_ops import OURS, Case, work


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


def measured(case: Case, impl: str | None, repeats: int = 10) -> float:
    """Seconds of a case on the default device."""
    q_shape = (case.batch, case.length, case.heads * case.head_dim)
    kv_shape = (case.batch, case.length, case.kv_heads * case.head_dim)
    keys = jax.random.split(jax.random.key(0), 4)
    dtype = jnp.dtype(case.dtype)
    q, k, v, do = (
        jax.random.normal(key, shape, jnp.float32).astype(dtype)
        for key, shape in zip(keys, (q_shape, kv_shape, kv_shape, q_shape), strict=True)
    )

    def forward(q, k, v):
        q, k, v = (x.reshape(*x.shape[:2], -1, case.head_dim) for x in (q, k, v))
        o = attention(q, k, v, causal=case.causal, window=case.window, impl=impl)
        return o.reshape(q_shape)

    def both(q, k, v, do):
        o, vjp = jax.vjp(forward, q, k, v)
        return o, vjp(do)

    if case.backward:
        return seconds(jax.jit(both), q, k, v, do, repeats=repeats)
    return seconds(jax.jit(forward), q, k, v, repeats=repeats)


def beside(case: Case, chip: Chip | None) -> str:
    """What is known without running: the prediction for a TPU, else the roofline."""
    if chip is None:
        return 'no prediction: not a chip of the table'
    if chip.is_tpu:
        request = {
            'op': 'attention', 'chip': chip.name, 'side': OURS, 'config': None,
            'case': dataclasses.asdict(case),
        }  # fmt: skip
        try:
            predicted = schedule_model.predict(
                request, chip, schedule_compile.default_cache()
            ).seconds
        except schedule_compile.CompileError as error:
            return f'no prediction: {error}'
        return f'predicted {1e6 * predicted:.1f} µs'
    # The MXU's padding is a TPU's; a GPU's roofline is plain.
    pairs = case.batch * case.heads * case.pairs
    flops = (14 if case.backward else 4) * pairs * case.head_dim
    least = work(case, dataclasses.replace(chip, mxu=1))
    roofline = max(flops / chip.peak_flops, least.hbm_bytes / chip.hbm_bytes_per_s)
    return f'roofline {1e6 * roofline:.1f} µs'


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog='pallas_kernels.benchmark', description=__doc__)
    parser.add_argument('--shape', default='8,2048,16,16,128', help='B,T,H,K,D')
    parser.add_argument('--causal', action='store_true')
    parser.add_argument('--window', type=int)
    parser.add_argument('--backward', action='store_true', help='forward and backward')
    parser.add_argument('--dtype', default='bfloat16')
    parser.add_argument('--impl', help='as in attention; default: that of the device')
    parser.add_argument('--repeats', type=int, default=10)
    args = parser.parse_args(argv)
    try:
        batch, length, heads, kv_heads, dim = map(int, args.shape.split(','))
    except ValueError:
        raise SystemExit(f'--shape must be B,T,H,K,D, not {args.shape!r}') from None
    case = Case(
        batch, length, heads, kv_heads, dim, args.causal, args.window, args.backward, args.dtype
    )
    chip = current_chip()
    device = jax.devices()[0]
    impl = args.impl
    if chip is None and impl is None:
        impl = 'xla'
        print(f"{device.device_kind}: neither a TPU nor a GPU of the table, so impl='xla' is timed")
    took = measured(case, impl, args.repeats)
    flops = (14 if case.backward else 4) * batch * heads * case.pairs * dim
    print(
        f'{case} on {device.device_kind}: measured {1e6 * took:.1f} µs '
        f'({flops / took / 1e12:.2f} TFLOP/s), {beside(case, chip)}'
    )


if __name__ == '__main__':
    main()
