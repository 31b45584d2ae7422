"""What the TPU compiler scheduled for a kernel, and the time it should take: no TPU is needed.

  python -m pallas_kernels.schedule --op=attention --chip=v6e --shape=8,2048,16,16,128 --causal \
      --against=tokamax,splash

A developer's diagnostic: it reads dumps of the compiler whose form may change with libtpu, and
nothing at run time depends on it. All figures are predicted; the last line says how well.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import Any

from pallas_kernels import (
    schedule_calibration,
    schedule_compile,
    schedule_model,
    schedule_rivals,
)
from pallas_kernels.chip import TPUS, named
from pallas_kernels.schedule_compile import CompileError
from pallas_kernels.schedule_ops import OURS, RIVALS, Case, chosen


def predicted(
    case: Case,
    chip: str,
    side: str = OURS,
    config: dict[str, Any] | None = None,
    cache: pathlib.Path | None = None,
    cached: bool = False,
) -> dict[str, Any]:
    """The prediction for one side of a comparison.

    Args:
      case: what is called.
      chip: name of a TPU generation.
      side: whose kernel.
      config: block sizes; None lets ours choose.
      cache: folder that keeps the compiler's dumps.
      cached: whether to raise rather than compile.

    Raises:
      CompileError: if it does not compile.
    """
    if side == OURS and config is None:
        config = chosen(case, named(chip))
    request = {
        'op': 'attention', 'chip': chip, 'side': side, 'config': config,
        'case': dataclasses.asdict(case),
    }  # fmt: skip
    if side != OURS:
        # Published kernels are timed with heads as a dimension of their own, and XLA transposes
        # that form for less; ours is handed what a projection makes.
        request['split'] = True
    return schedule_model.predict(request, named(chip), cache, cached).as_json()


def compare(
    case: Case,
    chip: str,
    against: list[str],
    cache: pathlib.Path | None = None,
    config: dict[str, Any] | None = None,
    cached: bool = False,
) -> dict[str, Any]:
    """Our prediction with the rivals' under 'rivals', each with its `ratio` (ours / theirs)."""
    result = predicted(case, chip, OURS, config, cache, cached)
    rivals: dict[str, Any] = {}
    for rival in against:
        tried, errors = [], []
        try:
            for sizes in schedule_rivals.configs(rival, case, chip):
                try:
                    tried.append(predicted(case, chip, rival, sizes, cache, cached))
                except CompileError as error:
                    errors.append(f'{sizes}: {error}')
        except CompileError as error:
            errors.append(str(error))
        if not tried:
            rivals[rival] = {'error': '; '.join(errors)}
            continue
        best = min(tried, key=lambda found: found['predicted_seconds'])
        best['ratio'] = result['predicted_seconds'] / best['predicted_seconds']
        best['kernel_ratio'] = result['kernel_seconds'] / best['kernel_seconds']
        rivals[rival] = best
    result['rivals'] = rivals
    return result


def describe(result: dict[str, Any], title: str) -> str:
    """A prediction in words."""
    us = 1e6 * result['predicted_seconds']
    kernels, around = 1e6 * result['kernel_seconds'], 1e6 * result['around_seconds']
    lines = [
        f'{title}: {us:.1f} µs predicted, {100 * result["fraction_of_peak"]:.1f} % of peak, '
        f'{result["times_roofline"]:.2f} x roofline',
        f'  kernels {kernels:.1f} µs (MXU floor {1e6 * result["mxu_floor_seconds"]:.1f}), around '
        f'them {around:.1f} µs',
    ]
    for name, seconds in result['around'].items():
        if seconds > 0.02 * result['predicted_seconds']:
            lines.append(f'    {name}: {1e6 * seconds:.1f} µs')
    lines.append(
        f'  {result["steps"]} steps that compute of {result["iterations"]} iterations, '
        f'{result["bundles"]:.0f} bundles a step ({result["total_bundles"]} in all), '
        f'{result["stall_cycles"]:.0f} cycles of waiting for copies'
    )
    for kernel in result['kernels']:
        lines += _describe_kernel(kernel)
    lines.append(
        f'  VMEM {result["vmem_bytes"] / 2**20:.1f} MiB of {result["vmem_limit"] / 2**20:.0f}, '
        f'HBM traffic {result["hbm_bytes"] / 1e6:.1f} MB, temporaries '
        f'{result["temp_bytes"] / 1e6:.1f} MB, {result["spills"]} spills'
    )
    lines.append(f'  block sizes {_plain(result["block_sizes"])}')
    lines += [f'  note: {note}' for note in result['notes']]
    return '\n'.join(lines)


def _describe_kernel(kernel: dict[str, Any]) -> list[str]:
    if 'bundles' not in kernel:
        return [f'  {kernel["name"]}: bundles not followed']
    used = ', '.join(f'{unit} {100 * share:.0f} %' for unit, share in kernel['utilization'].items())
    lines = [
        f'  {kernel["name"]}: {1e6 * kernel["seconds"]:.1f} µs, {kernel["bundles"]:.0f} bundles x '
        f'{kernel["steps"]} steps, {kernel["spills"]} spills',
        f'    {used}',
    ]
    big = [region for region in kernel['regions'] if region['bundles'] * region['times'] > 0]
    big.sort(key=lambda region: -region['bundles'] * region['times'])
    lines += [
        f'    from {region["start"]:#x}: {region["bundles"]} bundles x {region["times"]}'
        for region in big[:5]
    ]
    lines += [
        f'    from {region["start"]:#x}: {region["bundles"]} bundles that depend on data '
        '(a slow path: not counted)'
        for region in kernel['depends_on_data']
    ]
    return lines


def _plain(values: dict[str, Any]) -> str:
    return ', '.join(f'{k}={v}' for k, v in values.items() if v is not None)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='pallas_kernels.schedule', description=__doc__)
    parser.add_argument('--op', default='attention', choices=['attention'])
    parser.add_argument('--chip', default='v6e', choices=TPUS)
    parser.add_argument('--shape', required=True, help='B,T,H,K,D: K key-value heads')
    parser.add_argument('--causal', action='store_true')
    parser.add_argument('--window', type=int, help='positions seen on either side')
    parser.add_argument('--backward', action='store_true', help='forward and backward')
    parser.add_argument('--dtype', default='bfloat16')
    parser.add_argument('--against', default='', help=f'of {",".join(RIVALS)}')
    parser.add_argument('--block_sizes', help='q,kv,sub,chunk[,heads] of the forward pass')
    parser.add_argument('--backward_block_sizes', help='the same of the backward pass')
    parser.add_argument('--json', action='store_true', help='one object')
    parser.add_argument('--no_cache', action='store_true', help='compile again')
    return parser.parse_args(argv)


def _config(args: argparse.Namespace) -> dict[str, Any] | None:
    """Block sizes given by hand, None to let the kernel choose."""
    if not args.block_sizes:
        if args.backward_block_sizes:
            raise SystemExit('--backward_block_sizes needs --block_sizes')
        return None
    names = ('q', 'kv', 'sub', 'chunk', 'heads')
    forward, backward = (
        dict(zip(names, map(int, text.split(',')), strict=False)) if text else None
        for text in (args.block_sizes, args.backward_block_sizes)
    )
    return {**forward, 'backward': backward}


def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    try:
        batch, length, heads, kv_heads, dim = map(int, args.shape.split(','))
    except ValueError:
        raise SystemExit(f'--shape must be B,T,H,K,D, not {args.shape!r}') from None
    against = [name for name in args.against.split(',') if name]
    if unknown := set(against) - set(RIVALS):
        raise SystemExit(f'--against knows {", ".join(RIVALS)}, not {", ".join(unknown)}')
    case = Case(
        batch, length, heads, kv_heads, dim, args.causal, args.window, args.backward, args.dtype
    )
    cache = None if args.no_cache else schedule_compile.default_cache()
    try:
        warning = schedule_compile.version_warning()
        result = compare(case, args.chip, against, cache, config=_config(args))
    except CompileError as error:
        raise SystemExit(f'{case} on {args.chip}: {error}') from None
    if warning:
        result['notes'].append(warning)
    if args.json:
        print(json.dumps({'case': str(case), 'chip': args.chip, **result}))
        return
    print(describe(result, f'{case} on {args.chip}'))
    for name, rival in result['rivals'].items():
        if 'error' in rival:
            print(f'{name}: {rival["error"]}')
            continue
        print(describe(rival, f'against {name}'))
        print(f'  ratio {rival["ratio"]:.3f}; of the kernels alone {rival["kernel_ratio"]:.3f}')
    print(schedule_calibration.summary())


if __name__ == '__main__':
    main(sys.argv[1:])
