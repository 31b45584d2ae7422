"""The block sizes that published attention kernels are compared with."""

import importlib.util
import json
import math
import pathlib
import re
import statistics
from collections.abc import Iterator
from typing import Any

from pallas_kernels.schedule_attention import Case
from pallas_kernels.schedule_compile import CompileError

# Where tokamax keeps its tuned sizes for a chip. It has none for v5e, whose unit is v5p's, and
# backward ones for v7x only.
_FOLDERS = {'v5e': 'tpu_v5', 'v5p': 'tpu_v5', 'v6e': 'tpu_v6_lite', 'v7x': 'tpu7x'}
_FORWARD = 'pallas_mosaic_tpu_flash_attention.json'
_BACKWARD = 'pallas_mosaic_tpu_flash_attention_vjp.json'


def configs(rival: str, case: Case, chip: str) -> list[dict[str, Any] | None]:
    """The block sizes to try for `rival`, most promising first.

    Raises:
      CompileError: if the rival is not installed; the message says what to install.
    """
    if rival == 'xla':
        return [None]  # it chooses for itself
    if rival == 'splash':
        return list(_splash(case))
    if case.window is not None:
        # Its attention op refuses a window; the kernel below it takes one, with these sizes.
        case = Case(case.batch, case.length, case.heads, case.kv_heads, case.head_dim, True)
    config = _tuned(_data(chip, _FORWARD), case)
    config = {**config, **_tuned(_data('v7x', _BACKWARD), case)} if case.backward else config
    return [_shrunk(config, case.length)]


def _splash(case: Case) -> Iterator[dict[str, Any]]:
    for block in (2048, 1024):
        if block > case.length and block > 1024:
            continue
        block = min(block, case.length)
        compute = min(512, block)
        config = {'block_q': block, 'block_kv': block, 'block_kv_compute': compute}
        if case.backward:
            back = min(1024, block)
            config |= {
                'block_q_dkv': back, 'block_kv_dkv': back,
                'block_kv_dkv_compute': min(512, back), 'use_fused_bwd_kernel': True,
            }  # fmt: skip
        yield config


def _data(chip: str, file: str) -> dict[str, Any]:
    spec = importlib.util.find_spec('tokamax')
    if spec is None or not spec.submodule_search_locations:
        raise CompileError('tokamax is not installed: pip install tokamax==0.0.17')
    root = pathlib.Path(spec.submodule_search_locations[0]) / 'data' / 'autotuning'
    path = root / _FOLDERS[chip] / file
    if not path.exists():
        raise CompileError(f'tokamax has no tuned block sizes in {path.name} for {chip}')
    return json.loads(path.read_text())


def published(case: Case, chip: str) -> tuple[dict[str, Any], float]:
    """The block sizes and seconds that tokamax publishes for exactly this case.

    Raises:
      CompileError: if there is no timing of it.
    """
    forward = _nearest(_data(chip, _FORWARD), case)
    found = [forward, *([_nearest(_data(chip, _BACKWARD), case)] if case.backward else [])]
    if any(distance > 0 for distance, _, _ in found):
        raise CompileError(f'tokamax publishes no timing of {case} on {chip}')
    config = {name: value for _, _, config in found for name, value in config.items()}
    return config, sum(seconds for _, seconds, _ in found)


def _tuned(data: dict[str, Any], case: Case) -> dict[str, Any]:
    """The fastest measured sizes of the call most like `case`."""
    return _nearest(data, case)[2]


def _nearest(data: dict[str, Any], case: Case) -> tuple[float, float, dict[str, Any]]:
    """The measured call most like `case`: how far it is, its seconds and its sizes."""
    best: tuple[float, float, dict[str, Any]] | None = None
    for key, measured in data.items():
        call = json.loads(key)
        if not measured or call['bias'] or call['mask']['bool_mask']:
            continue
        if bool(call['mask']['causal_mask']) != case.causal:
            continue
        if 'residuals' not in call and call['return_residuals'] != case.backward:
            continue
        batch, length, heads, dim = _shape(call['q'])
        kv_heads = _shape(call['k'])[2]
        distance = (
            8 * abs(math.log2(dim / case.head_dim))
            + 2 * abs(math.log2(length / case.length))
            + abs(math.log2(heads / kv_heads * case.kv_heads / case.heads))
            + 0.1 * abs(math.log2(batch * heads / case.batch / case.heads))
        )
        for config, timings in measured.items():
            seconds = 1e-3 * statistics.median(timings['evaluation_times_ms'])
            if best is None or (distance, seconds) < best[:2]:
                best = distance, seconds, json.loads(config)
    if best is None:
        raise CompileError(f'tokamax has no tuned block sizes for {case}')
    return best


def _shape(text: str) -> tuple[int, ...]:
    dims = tuple(int(d) for d in re.search(r'\[([\d,]+)\]', text)[1].split(','))
    return (1,) * (4 - len(dims)) + dims[-4:]


def _shrunk(config: dict[str, Any], length: int) -> dict[str, Any]:
    """`config` with no block longer than the call."""
    return {
        name: min(value, length) if name.startswith('block_') else value
        for name, value in config.items()
    }
