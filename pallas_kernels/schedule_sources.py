"""The source files that decide what is compiled for a case: kept dumps are named by them."""

import ast
import pathlib
from typing import Any

ROOT = pathlib.Path(__file__).parent
# Files beside the kernels that a prediction does not go through.
_ELSEWHERE = ('decode', 'ring', 'sharded', 'partition', 'xla', 'reference')


def of(op: str, case: dict[str, Any]) -> list[pathlib.Path]:
    """The files that our side of a case goes through, in order."""
    if op == 'attention':
        return _attention(case['backward'])
    conv = ROOT / 'conv'
    start = [conv / 'differentiable.py', conv / 'tpu' / '__init__.py', *_kind(op, case)]
    return sorted(_imported(start))


def _attention(backward: bool) -> list[pathlib.Path]:
    folder = ROOT / 'attention'
    return [
        path
        for path in sorted([*folder.glob('*.py'), *folder.glob('tpu/*.py')])
        if not path.name.startswith(_ELSEWHERE) and (backward or 'backward' not in path.name)
    ]


def _kind(op: str, case: dict[str, Any]) -> list[pathlib.Path]:
    """The kernel that a convolution comes to; all of them where that cannot be told."""
    folder = ROOT / 'conv' / 'tpu'
    if op == 'gated_conv1d':
        return sorted(folder.glob('gated*.py'))
    from pallas_kernels.conv import tpu
    from pallas_kernels.schedule_conv import Case, operands

    name = tpu.kind(*operands(Case(**case)))
    return sorted(folder.glob(f'{name}*.py'))


def _imported(files: list[pathlib.Path]) -> set[pathlib.Path]:
    """`files` and, of this package, what they import."""
    found: set[pathlib.Path] = set()
    left = list(files)
    while left:
        path = left.pop()
        if path in found or path.name.startswith(_ELSEWHERE):
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or '').startswith(ROOT.name):
                names = [node.module, *(f'{node.module}.{alias.name}' for alias in node.names)]
                left += [file for name in names if (file := _file(name)) is not None]
    return found


def _file(module: str) -> pathlib.Path | None:
    """A module's file; None for a name that is no module, or a package, which only re-exports."""
    path = ROOT.joinpath(*module.split('.')[1:])
    return path.with_suffix('.py') if path.with_suffix('.py').exists() else None
