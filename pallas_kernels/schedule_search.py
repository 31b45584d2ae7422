"""Finds block sizes by the schedule model and writes them to block_sizes.json.

  python -m pallas_kernels.schedule_search [--chip=v6e] [--dim=128] [--length=4096]

compiles the attention kernel with a few sizes for every class of shapes and keeps the fastest
predicted. A class that is in the file is left alone unless --again is given.
"""

import argparse
import dataclasses
import json
import sys
from typing import Any

from pallas_kernels import block_sizes, schedule_compile, schedule_model
from pallas_kernels.block_sizes import AttentionShape, BlockSizes
from pallas_kernels.chip import TPUS, named
from pallas_kernels.schedule_attention import Case
from pallas_kernels.schedule_compile import CompileError
from pallas_kernels.schedule_work import OURS

DIMS = (64, 128, 256)
LENGTHS = (2048, 4096)


def candidates(chosen: BlockSizes) -> list[BlockSizes]:
    """The rule's sizes, and those with tiles of 256 for 512 or the other way round.

    How large the blocks are is the rule's business: they are as large as VMEM and the call allow.
    """
    found = [chosen]
    for name, block in (('sub', chosen.kv), ('chunk', chosen.q)):
        for size in (256, 512):
            if size != getattr(chosen, name) and block % size == 0:
                found.append(dataclasses.replace(chosen, **{name: size}))
    return found


def best(case: Case, chip: str, backward: bool) -> tuple[BlockSizes, float] | None:
    """The fastest predicted sizes of the forward or the backward pass, and their seconds."""
    case = dataclasses.replace(case, backward=backward)
    shape = AttentionShape(
        case.batch, case.length, case.length, case.heads, case.kv_heads, case.head_dim,
        case.head_dim,
    )  # fmt: skip
    chosen = block_sizes.choose(
        'attention', shape, case.dtype, causal=case.causal, chip=named(chip)
    )
    found: list[tuple[BlockSizes, float]] = []
    sizes_now = chosen.backward if backward else dataclasses.replace(chosen, backward=None)
    for sizes in candidates(sizes_now):
        both = dataclasses.replace(chosen, backward=sizes) if backward else sizes
        request: dict[str, Any] = {
            'op': 'attention', 'chip': chip, 'side': OURS,
            'config': dataclasses.asdict(both), 'case': vars(case),
        }  # fmt: skip
        try:
            prediction = schedule_model.predict(
                request, named(chip), schedule_compile.default_cache()
            )
        except CompileError as error:
            print(f'{chip} {case} {sizes}: {error}', file=sys.stderr)
            continue
        found.append((sizes, prediction.seconds))
        print(f'{chip} {case} {sizes}: {1e6 * prediction.seconds:.1f} µs', flush=True)
    return min(found, key=lambda pair: pair[1], default=None)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--chip', default=','.join(TPUS))
    parser.add_argument('--dim', default=','.join(map(str, DIMS)))
    parser.add_argument('--length', default=','.join(map(str, LENGTHS)))
    parser.add_argument('--forward', action='store_true', help='the forward pass only')
    parser.add_argument('--again', action='store_true', help='classes that are there already, too')
    args = parser.parse_args(argv)
    for chip in args.chip.split(','):
        for dim in map(int, args.dim.split(',')):
            for length in map(int, args.length.split(',')):
                for causal in (True, False):
                    heads = 2048 // dim
                    case = Case(16384 // length, length, heads, heads, dim, causal)
                    _fill(case, chip, args.forward, args.again)


def _fill(case: Case, chip: str, forward: bool, again: bool) -> None:
    """Writes the row of one class."""
    T, H, D = case.length, case.heads, case.head_dim
    shape = AttentionShape(case.batch, T, T, H, case.kv_heads, D, D)
    name = block_sizes.shape_class('attention', chip, shape, case.dtype, case.causal)
    path = block_sizes.TABLE
    table = json.loads(path.read_text()) if path.exists() else {}
    row = {} if again else dict(table.get(name, {}))
    for part in ('forward',) if forward else ('forward', 'backward'):
        if part in row:
            continue
        found = best(case, chip, part == 'backward')
        if found is not None:
            sizes = dataclasses.asdict(found[0])
            row[part] = {key: value for key, value in sizes.items() if value is not None}
    if row:
        table[name] = row
        path.write_text(json.dumps(dict(sorted(table.items())), indent=1) + '\n')


if __name__ == '__main__':
    main()
