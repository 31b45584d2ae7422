"""What the TPU compiler scheduled for a kernel, and the time it should take: no TPU is needed.

  python -m pallas_kernels.schedule --op=attention --chip=v6e --shape=8,2048,16,16,128 --causal \
      --against=tokamax,splash
  python -m pallas_kernels.schedule --op=conv2d --chip=v6e --input=32,56,56,64 --kernel=3,3,64 \
      --backward --against=xla

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
    schedule_flags,
    schedule_model,
    schedule_rivals,
)
from pallas_kernels.chip import TPUS, named
from pallas_kernels.schedule_compile import CompileError
from pallas_kernels.schedule_ops import module
from pallas_kernels.schedule_work import OURS


def predicted(
    case: Any,
    chip: str,
    side: str = OURS,
    config: dict[str, Any] | None = None,
    cache: pathlib.Path | None = None,
    cached: bool = False,
    slow_paths: bool = False,
) -> dict[str, Any]:
    """The prediction for one side of a comparison.

    Args:
      case: what is called.
      chip: name of a TPU generation.
      side: whose kernel.
      config: block sizes; None lets ours choose.
      cache: folder that keeps the compiler's dumps.
      cached: whether to raise rather than compile.
      slow_paths: whether to go through every path that depends on data.

    Raises:
      CompileError: if it does not compile.
    """
    if side == OURS and config is None:
        config = module(case.op).chosen(case, named(chip))
    request = {
        'op': case.op, 'chip': chip, 'side': side, 'config': config,
        'case': dataclasses.asdict(case),
    }  # fmt: skip
    if side != OURS and case.op == 'attention':
        # Published kernels are timed with heads as a dimension of their own, and XLA transposes
        # that form for less; ours is handed what a projection makes.
        request['split'] = True
    return schedule_model.predict(request, named(chip), cache, cached, slow_paths).as_json()


def compare(
    case: Any,
    chip: str,
    against: list[str],
    cache: pathlib.Path | None = None,
    config: dict[str, Any] | None = None,
    cached: bool = False,
    side: str = OURS,
) -> dict[str, Any]:
    """A side's prediction with the rivals' under 'rivals', each with the `ratio` to it."""
    result = predicted(case, chip, side, config, cache, cached)
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
        if best['kernel_seconds']:
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
        f"  by bundles and copies {1e6 * result['model_seconds']:.1f} µs, by the compiler's "
        f'estimates {1e6 * result["estimate_seconds"]:.1f} µs, roofline '
        f'{1e6 * result["roofline_seconds"]:.1f} µs',
        f'  kernels {kernels:.1f} µs (MXU floor {1e6 * result["mxu_floor_seconds"]:.1f}), around '
        f'them {around:.1f} µs',
    ]
    for name, seconds in result['around'].items():
        if seconds > 0.02 * result['predicted_seconds']:
            estimate = result['estimates'].get(name)
            told = '' if estimate is None else f' (the compiler: {1e6 * estimate:.1f})'
            lines.append(f'    {name}: {1e6 * seconds:.1f} µs{told}')
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
    if result['block_sizes']:
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
    parser.add_argument('--chip', default='v6e', choices=TPUS)
    schedule_flags.add(parser)
    parser.add_argument('--side', default=OURS, help='whose: ours, or one that --against takes')
    parser.add_argument('--against', default='', help='of tokamax,splash (attention), xla')
    parser.add_argument('--block_sizes', help='q,kv,sub,chunk[,heads] of the forward pass')
    parser.add_argument('--backward_block_sizes', help='the same of the backward pass')
    parser.add_argument(
        '--slow_path', action='store_true', help='also the time if every check of data failed'
    )
    parser.add_argument('--json', action='store_true', help='one object')
    parser.add_argument('--no_cache', action='store_true', help='compile again')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    case = schedule_flags.case(args)
    against = [name for name in args.against.split(',') if name]
    rivals = module(case.op).RIVALS
    if unknown := {*against, args.side} - {*rivals, OURS}:
        raise SystemExit(
            f'{args.op} is compared with {", ".join(rivals)}, not {", ".join(unknown)}'
        )
    cache = None if args.no_cache else schedule_compile.default_cache()
    try:
        warning = schedule_compile.version_warning()
        config = schedule_flags.config(args)
        result = compare(case, args.chip, against, cache, config, side=args.side)
        if args.slow_path:
            slow = predicted(case, args.chip, args.side, config, cache, slow_paths=True)
            result['slow_path_seconds'] = slow['predicted_seconds']
    except CompileError as error:
        raise SystemExit(f'{case} on {args.chip}: {error}') from None
    if warning:
        result['notes'].append(warning)
    if args.json:
        print(json.dumps({'case': str(case), 'chip': args.chip, **result}))
        return
    print(describe(result, f'{case} on {args.chip}'))
    if args.slow_path:
        slow_us, ratio = (
            1e6 * slow['predicted_seconds'],
            slow['predicted_seconds'] / result['predicted_seconds'],
        )
        print(f'  by the slow path everywhere {slow_us:.1f} µs, {ratio:.2f} x')
    for name, rival in result['rivals'].items():
        if 'error' in rival:
            print(f'{name}: {rival["error"]}')
            continue
        print(describe(rival, f'against {name}'))
        alone = (
            f'; of the kernels alone {rival["kernel_ratio"]:.3f}' if 'kernel_ratio' in rival else ''
        )
        print(f'  ratio {rival["ratio"]:.3f}{alone}')
    if case.op == 'attention':
        print(schedule_calibration.summary())
    else:
        print('Not calibrated for convolutions: no timings of them are published.')


if __name__ == '__main__':
    main(sys.argv[1:])
