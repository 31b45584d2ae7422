"""The command line's way to say a case of each op, for the tools that take one."""

import argparse
from typing import Any

from pallas_kernels import schedule_attention, schedule_conv
from pallas_kernels.schedule_ops import MODULES

_BLOCKS = {
    'attention': ('q', 'kv', 'sub', 'chunk', 'heads'),
    'conv2d': ('rows', 'cols', 'batch', 'channels', 'features'),
}


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of every op's case."""
    parser.add_argument('--op', default='attention', choices=MODULES)
    parser.add_argument('--backward', action='store_true', help='forward and backward')
    parser.add_argument('--dtype', default='bfloat16')
    attention = parser.add_argument_group('attention')
    attention.add_argument('--shape', default='8,2048,16,16,128', help='B,T,H,K,D')
    attention.add_argument('--causal', action='store_true')
    attention.add_argument('--window', type=int, help='positions seen on either side')
    conv = parser.add_argument_group('conv2d, conv1d, gated_conv1d')
    conv.add_argument('--input', default='', help='B,H,W,C or B,T,C')
    conv.add_argument('--kernel', default='', help='rows,columns,features or taps,features')
    conv.add_argument('--stride', type=int, default=1)
    conv.add_argument('--dilation', type=int, default=1)
    conv.add_argument('--groups', type=int, default=1)
    conv.add_argument('--padding', help='SAME, VALID, CAUSAL or before,after')
    conv.add_argument('--pass', dest='passes', choices=schedule_conv.PASSES, default='forward')
    conv.add_argument('--epilogue', default='', help=f'of {",".join(schedule_conv.EPILOGUES)}')
    conv.add_argument('--segments', action='store_true', help='packed segments')
    conv.add_argument('--skip', type=int, default=0, help="channels of a gated unit's skip output")
    conv.add_argument('--layouts', choices=schedule_conv.LAYOUTS, help='of arguments and results')


def case(args: argparse.Namespace) -> Any:
    """The case that the flags say.

    Raises:
      SystemExit: if they do not say one; the message names the flag.
    """
    return _attention(args) if args.op == 'attention' else _conv(args)


def _attention(args: argparse.Namespace) -> schedule_attention.Case:
    batch, length, heads, kv_heads, dim = _numbers('shape', args.shape, 'B,T,H,K,D')
    return schedule_attention.Case(
        batch, length, heads, kv_heads, dim, args.causal, args.window, args.backward, args.dtype
    )


def _conv(args: argparse.Namespace) -> schedule_conv.Case:
    if args.op == 'conv2d':
        B, H, W, C = _numbers('input', args.input, 'B,H,W,C')
        K, L, features = _numbers('kernel', args.kernel, 'rows,columns,features')
    else:
        B, W, C = _numbers('input', args.input, 'B,T,C')
        L, features = _numbers('kernel', args.kernel, 'taps,features')
        H = K = 1
    words = [word for word in args.epilogue.split(',') if word]
    if unknown := set(words) - set(schedule_conv.EPILOGUES):
        known = ', '.join(schedule_conv.EPILOGUES)
        raise SystemExit(f'--epilogue knows {known}, not {", ".join(sorted(unknown))}')
    padding = args.padding or ('SAME' if args.op == 'conv2d' else 'CAUSAL')
    if padding not in ('SAME', 'VALID', 'CAUSAL'):
        _numbers('padding', padding, 'SAME, VALID, CAUSAL or before,after', 2)
    if C % args.groups or features % args.groups:
        raise SystemExit(
            f'--groups={args.groups} must divide the channels {C} and features {features}'
        )
    return schedule_conv.Case(
        args.op, B, H, W, C, K, L, features, args.stride, args.dilation, args.groups, padding,
        'all' if args.backward else args.passes, args.epilogue, args.segments, args.skip,
        args.dtype, args.layouts or ('free' if args.op == 'conv2d' else 'default'),
    )  # fmt: skip


def _numbers(flag: str, text: str, form: str, count: int | None = None) -> list[int]:
    try:
        numbers = [int(number) for number in text.split(',')]
    except ValueError:
        numbers = []
    if len(numbers) != (count or form.count(',') + 1):
        raise SystemExit(f'--{flag} must be {form}, not {text!r}')
    return numbers


def config(args: argparse.Namespace) -> dict[str, Any] | None:
    """Block sizes given by hand, None to let the kernel choose."""
    if not args.block_sizes:
        if args.backward_block_sizes:
            raise SystemExit('--backward_block_sizes needs --block_sizes')
        return None
    if args.op != 'attention':
        names = _BLOCKS['conv2d']
        sizes = zip(names, args.block_sizes.split(','), strict=False)
        return {name: int(size) for name, size in sizes if size}
    forward, backward = (
        dict(zip(_BLOCKS['attention'], map(int, text.split(',')), strict=False)) if text else None
        for text in (args.block_sizes, args.backward_block_sizes)
    )
    return {**forward, 'backward': backward}
