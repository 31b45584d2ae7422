"""What Pallas kernels take, of whose insides a compiled program says nothing.

Attention's seconds come from `pallas_kernels.schedule`, which compiles a kernel once a shape, or
at once from shares of the peak that the same model found for the table in pallas_kernels/README.md;
`python -m bigjax.plan.program.kernels` copies them from there to kernels.json.
"""

import dataclasses
import functools
import json
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any

from bigjax.plan.hardware import Hardware
from bigjax.plan.program.hlo import Array, Computation, Instruction

PALLAS = 'tpu_custom_call'
TABLE = pathlib.Path(__file__).with_suffix('.json')
README = pathlib.Path(__file__).resolve().parents[3] / 'pallas_kernels' / 'README.md'
_ROW = re.compile(
    r'\| (\w+) \| (\d+)×(\d+)×(\d+)/\d+×(\d+) \| (causal|full) \| (fwd|fwd \+ bwd) \| '
    r'(\d+) \([^)]*\) \| (?:\d+ \((\d+)\)|–) \|'
)
_OF_TYPE = {'v4': 'v5p'}  # whose units a generation has that was not compiled for
_FORWARD, _BACKWARD = 'forward', 'backward'


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One call of a Pallas kernel.

    Attributes:
      name: that the kernel gave itself, such as 'attention_forward'.
      inputs: arrays that it reads.
      outputs: arrays that it makes.
      op_name: what of the traced program it came from.
    """

    name: str
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    op_name: str = ''


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one call of a kernel takes.

    Attributes:
      seconds: of one device.
      flops: of its matrix products, of the pairs of a query and a key that are seen.
      source: where the seconds are from.
    """

    seconds: float
    flops: float
    source: str = ''


# What a kernel takes, None where that is not known.
Kernels = Callable[[Kernel], Cost | None]


@dataclasses.dataclass(frozen=True)
class Attention:
    """A call of attention, or of its gradient.

    Attributes:
      which: 'forward', 'backward', or of a published kernel's gradient 'keys' or 'queries'.
      batch, queries, keys, heads, kv_heads, dim, value_dim: sizes.
      published: whether it is JAX's or tokamax's kernel (splash), not one of pallas_kernels.
    """

    which: str
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    published: bool = False

    def flops(self, causal: bool) -> float:
        """Two products forward; five, one of them again, for the gradient."""
        # Of a part of the queries, as a ring or a gather has, half of the pairs are seen, too.
        pairs = self.queries * (self.keys + 1) / 2 if causal else self.queries * self.keys
        of_keys, of_values = {
            _FORWARD: (1, 1), _BACKWARD: (3, 2), 'keys': (2, 2), 'queries': (2, 1),
        }[self.which]  # fmt: skip
        width = of_keys * self.dim + of_values * self.value_dim
        return 2.0 * self.batch * self.heads * pairs * width


def kernel_of(computation: Computation, instruction: Instruction) -> Kernel | None:
    """Returns the Pallas kernel that an instruction calls, None if it calls none."""
    if instruction.target != PALLAS:
        return None
    # op_name ends in '…/name/pallas_call'; the instruction is called after the kernel, too.
    parts = instruction.op_name.split('/')
    named = parts[-2] if len(parts) > 1 and parts[-1] == 'pallas_call' else ''
    name = named or instruction.name.split('.')[0]
    inputs = tuple(a for operand in computation.operands(instruction) for a in operand.arrays)
    return Kernel(name, inputs, instruction.arrays, instruction.op_name)


def attention_of(kernel: Kernel) -> Attention | None:
    """Returns the call of attention that a kernel is, read from its arrays; None for others."""
    if kernel.name.startswith('splash_m'):
        return _splash(kernel)
    which = kernel.name.removeprefix('attention_')
    if which not in (_FORWARD, _BACKWARD):
        return None
    # [B, T, H D], [B, S, K D] and [B, S, K V] behind the scalars; [B, H, 1, T] has the heads.
    q, k, v = (array.dims for array in kernel.inputs[1:4])
    beside = kernel.outputs if which == _FORWARD else kernel.inputs
    heads = next(a.dims[1] for a in beside if len(a.dims) == 4 and a.dims[2] == 1)
    dim = q[2] // heads
    kv_heads = k[2] // dim
    return Attention(which, q[0], q[1], k[1], heads, kv_heads, dim, v[2] // kv_heads)


def _splash(kernel: Kernel) -> Attention | None:
    """JAX's splash attention: [(B,) H, T, D] and [(B,) K, S, D] among its inputs."""
    which = _FORWARD if '_fwd' in kernel.name else 'keys' if '_dkv' in kernel.name else 'queries'
    if '_dkv' in kernel.name and len(kernel.outputs) > 2:
        which = _BACKWARD  # the fused form makes the queries' gradient, too
    large = [a.dims for a in kernel.inputs if a.dtype in ('bf16', 'f32') and len(a.dims) > 2]
    if len(large) < 3:
        return None
    (*batch, heads, queries, dim), (*_, kv_heads, keys, _), (*_, value_dim) = large[:3]
    return Attention(
        which, math.prod(batch), queries, keys, heads, kv_heads, dim, value_dim, published=True
    )


def from_table(hardware: Hardware, *, causal: bool = True) -> Kernels:
    """Returns what kernels take by the committed shares of the peak, without a compile.

    Args:
      hardware: what they run on.
      causal: whether all attention is masked so, which a compiled kernel does not say; if not, the
        own attention of a decoder beside an encoder is.
    """

    def cost(kernel: Kernel) -> Cost | None:
        call = attention_of(kernel)
        if call is None:
            return None
        masked = causal or ('/decoder/' in kernel.op_name and '/cross/' not in kernel.op_name)
        share = share_of_peak(call, hardware.name, masked)
        flops = call.flops(masked)
        return Cost(flops / (share * hardware.peak_flops), flops, 'table of pallas_kernels')

    return cost


def from_schedule(
    hardware: Hardware,
    *,
    causal: bool = True,
    cache: pathlib.Path | None = None,
    cached: bool = False,
) -> Kernels:
    """Returns what kernels take by the schedule model, which compiles each shape once (10-60 s).

    What it cannot tell is as in `from_table`.

    Args:
      hardware: what they run on.
      causal: whether attention is masked so.
      cache: folder that keeps compiled kernels; None takes that of `pallas_kernels.schedule`.
      cached: whether to take the table's figure for what was not compiled before.
    """
    table = from_table(hardware, causal=causal)

    @functools.cache
    def seconds(call: Attention) -> float | None:
        from pallas_kernels import schedule, schedule_attention, schedule_compile

        # Heads and rows of a batch are alike: a few stand for all.
        batch = min(call.batch, 4)
        case = schedule_attention.Case(
            batch, call.queries, call.heads, call.kv_heads, call.dim, causal,
            backward=call.which == _BACKWARD,
        )  # fmt: skip
        folder = cache or schedule_compile.default_cache()
        try:
            found = schedule.predicted(case, hardware.name, cache=folder, cached=cached)
        except (schedule_compile.CompileError, ValueError, ImportError):
            return None
        named = f'attention_{call.which}'
        parts = [k['seconds'] for k in found['kernels'] if k['name'].startswith(named)]
        return sum(parts) * call.batch / batch if parts else None

    def cost(kernel: Kernel) -> Cost | None:
        call = attention_of(kernel)
        square = call and call.queries == call.keys and call.dim == call.value_dim
        found = seconds(call) if call and square and not call.published else None
        if call is None or found is None:
            return table(kernel)
        return Cost(found, call.flops(causal), 'schedule of the compiled kernel')

    return cost


@functools.cache
def _table() -> list[dict[str, Any]]:
    return json.loads(TABLE.read_text())


def share_of_peak(call: Attention, chip: str, causal: bool) -> float:
    """Returns the share of the peak that a call reaches, by the nearest shape of the table."""
    chip = _OF_TYPE.get(chip, chip)
    side = 'published' if call.published else 'ours'
    which = _FORWARD if call.which == _FORWARD else _BACKWARD
    rows = [row for row in _table() if row['pass'] == which and side in row]
    # Another chip's figure is worse than another mask's, that one worse than another head's.
    best = min(
        rows,
        key=lambda row: (
            8 * (row['chip'] != chip)
            + 4 * (row['causal'] != causal)
            + 2 * abs(math.log2(row['dim'] / call.dim))
            + abs(math.log2(row['length'] / call.keys))
        ),
    )
    # The gradient's is a difference of two, each of which is rounded and has a floor.
    return min(best[side], 1.0)


def read_table(text: str, peaks: dict[str, float]) -> list[dict[str, Any]]:
    """Returns the shares of the peak in the table of pallas_kernels/README.md.

    Args:
      text: the page.
      peaks: FLOPs per second by generation.
    """
    seconds: dict[tuple, tuple[float, float | None]] = {}
    for chip, batch, length, heads, dim, mask, passes, ours, rival in _ROW.findall(text):
        shape = (chip, int(batch), int(length), int(heads), int(dim), mask == 'causal')
        both = 1e-6 * float(ours), 1e-6 * float(rival) if rival else None
        seconds[(*shape, passes)] = both
    found = []
    for (chip, batch, length, heads, dim, causal, passes), (ours, published) in seconds.items():
        which = _FORWARD
        if passes != 'fwd':
            which = _BACKWARD
            ahead = seconds.get((chip, batch, length, heads, dim, causal, 'fwd'))
            if ahead is None:
                continue
            ours -= ahead[0]
            published = published - ahead[1] if published and ahead[1] else None
        call = Attention(which, batch, length, length, heads, heads, dim, dim)
        flops = call.flops(causal)
        row = {'chip': chip, 'dim': dim, 'length': length, 'causal': causal, 'pass': which,
               'ours': round(flops / ours / peaks[chip], 3)}  # fmt: skip
        if published:
            row['published'] = round(flops / published / peaks[chip], 3)
        found.append(row)
    return found


def main() -> None:
    """Writes kernels.json."""
    from bigjax.plan.hardware import HARDWARE

    rows = read_table(README.read_text(), {name: h.peak_flops for name, h in HARDWARE.items()})
    lines = ',\n'.join(f'  {json.dumps(row)}' for row in rows)
    TABLE.write_text(f'[\n{lines}\n]\n')
    print(f'{len(rows)} rows in {TABLE.name}')


if __name__ == '__main__':
    main()
