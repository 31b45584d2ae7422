"""A compiled program as a list of events in schedule order: what computes, what starts, what waits.

Costs come from the compiler's own cycles ("high"), and for what holds matrix products also from
their arithmetic at a fixed share of the peak ("low"): the compiler's model of them is pessimistic.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator

from bigjax.plan.program.collectives import Exchange, across_slices, exchange, kind_of
from bigjax.plan.program.fabric import Fabric
from bigjax.plan.program.flops import Product, products
from bigjax.plan.program.hlo import Computation, Instruction, Module
from bigjax.plan.program.kernels import PALLAS, Kernels, kernel_of
from bigjax.plan.program.loops import Carried, initial, invariant, trips
from bigjax.plan.program.traffic import FREE, host_bytes, moved_beside, traffic

# Share of the peak that large matrix products reach in the lower figure.
PEAK_SHARE = 0.95
_NO_TIME = ('AllocateBuffer', 'ConcatBitcast', 'AssumeGatherIndicesInBound', 'Sharding')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """One instruction of the schedule, or a loop over several.

    Attributes:
      name: of the instruction.
      category: 'matmul', 'kernels' or 'other', what its seconds count as.
      low: seconds with products at a share of the peak.
      high: seconds by the compiler's cycles.
      key: what an event of a later `ends` calls what begins here.
      begins: an exchange between devices that begins here, beside what follows.
      copies: seconds of a copy between HBM and VMEM that begins here.
      ends: key of what has to be over.
      body: events of a loop or of the longest branch of several.
      trips: how often `body` runs.
      flops: of matrix products.
      kernel_flops: of Pallas kernels.
      rematerialized_flops: of products that the compiler computes a second time.
      hbm_bytes: read and written.
      host_bytes: moved to or from the host's memory.
      note: what a reader must know.
    """

    name: str
    category: str = 'other'
    low: float = 0.0
    high: float = 0.0
    key: str = ''
    begins: Exchange | None = None
    copies: float = 0.0
    ends: str = ''
    body: tuple['Event', ...] = ()
    trips: int = 1
    flops: float = 0.0
    kernel_flops: float = 0.0
    rematerialized_flops: float = 0.0
    hbm_bytes: float = 0.0
    host_bytes: float = 0.0
    note: str = ''


@dataclasses.dataclass(frozen=True)
class Reader:
    """Turns the computations of a program into events.

    Attributes:
      module: the program.
      fabric: devices and networks.
      kernels: what Pallas kernels take.
    """

    module: Module
    fabric: Fabric
    kernels: Kernels

    @functools.cached_property
    def _asynchronous(self) -> frozenset[str]:
        """Channels of exchanges that one fusion starts, others pursue and another one ends."""
        return frozenset(
            inner.channel
            for computation in self.module.computations.values()
            if any(i.target == 'AsyncCollectiveStart' for i in computation.instructions.values())
            for inner in computation.instructions.values()
            if kind_of(inner)
        )

    def events(self, computation: Computation, carried: Carried) -> tuple[Event, ...]:
        """Returns the events of a computation whose parameter holds scalars worth `carried`."""
        found: list[Event] = []
        for instruction in computation.instructions.values():
            found += self._events(computation, instruction, carried)
        return tuple(found)

    def _events(
        self, computation: Computation, instruction: Instruction, carried: Carried
    ) -> Iterator[Event]:
        opcode = instruction.opcode
        if opcode == 'while':
            yield self._loop(computation, instruction, carried)
        elif opcode == 'call':
            for called in self.module.called(instruction):
                yield from self.events(called, lambda _: None)
        elif opcode == 'conditional':
            branches = [self.events(c, lambda _: None) for c in self.module.called(instruction)]
            longest, note = max(branches, key=_length), 'the longest branch of a conditional counts'
            if '/attention/' in instruction.op_name:
                # A ring skips the half of its blocks of which nothing is seen; kernels count so.
                longest = tuple(_half(event) for event in longest)
                note = 'half of the blocks of a ring of attention are skipped'
            yield Event(name=instruction.name, body=longest, note=note)
        elif opcode.endswith('-done'):
            yield Event(name=instruction.name, ends=_begun(computation, instruction))
        elif opcode == 'send' and 'megascale' in instruction.attributes.get(
            'frontend_attributes', ''
        ):
            moved = across_slices(computation, instruction, self.fabric)
            yield Event(name=instruction.name, key=_rendezvous(instruction), begins=moved)
        elif opcode.endswith('-update'):
            # Another core is made ready at the start, and given its operands here.
            start = computation.operands(instruction)[0]
            if not start.operands:
                yield from self._work(computation, start, given=instruction)
        elif opcode in FREE or opcode in ('recv', 'send') or _made_ready(computation, instruction):
            return
        else:
            yield from self._work(computation, instruction)

    def _loop(self, computation: Computation, instruction: Instruction, carried: Carried) -> Event:
        body = self.module.computations[instruction.attributes['body'].lstrip('%')]
        count = trips(self.module, computation, instruction, carried)
        first = initial(self.module, computation, instruction, carried)
        constant = invariant(self.module, instruction, first)
        note = f'{instruction.name}: trips of this loop are not known; it counts once'
        return Event(
            name=instruction.name, body=self.events(body, constant),
            trips=1 if count is None else count, note=note if count is None else '',
        )  # fmt: skip

    def _work(
        self, computation: Computation, instruction: Instruction, given: Instruction | None = None
    ) -> Iterator[Event]:
        """Events of what computes, copies or exchanges, with its operands or those `given` it."""
        moved, key, stage = self._exchange(computation, instruction)
        if instruction.opcode.endswith('-start') and instruction.target != PALLAS:
            if moved is None:
                yield self._copy(computation, instruction, given or instruction)
            else:
                yield Event(name=instruction.name, key=key, begins=moved)
            return
        cost = self._cost(computation, instruction, exchanges=bool(moved or stage))
        if stage == 'done':
            yield dataclasses.replace(cost, ends=key)
        elif stage == 'start':
            yield dataclasses.replace(cost, key=key, begins=moved)
        elif moved is not None:
            yield cost
            yield Event(name=instruction.name, key=instruction.name, begins=moved)
            yield Event(name=instruction.name, ends=instruction.name)
        else:
            yield cost

    def _exchange(
        self, computation: Computation, instruction: Instruction
    ) -> tuple[Exchange | None, str, str]:
        """The exchange that an instruction is or holds, its key, and which stage of it.

        A fusion may start one ('start'), compute beside one ('beside') or end one ('done').
        """
        if kind_of(instruction):
            moved = exchange(computation, instruction, self.fabric)
            return moved, instruction.name, ''
        inside = list(self.module.inside(instruction))
        targets = [inner.target for _, inner in inside if inner.target]
        for where, inner in inside:
            if not kind_of(inner):
                continue
            channel = f'channel {inner.channel}'
            if 'AsyncCollectiveDone' in targets:
                return None, channel, 'done'
            moved = exchange(where, inner, self.fabric, fused=True)
            if 'AsyncCollectiveStart' in targets:
                return moved, channel, 'start'
            if inner.channel in self._asynchronous:
                return None, channel, 'beside'
            return moved, instruction.name, ''
        return None, '', ''

    def _copy(
        self, computation: Computation, instruction: Instruction, given: Instruction
    ) -> Event:
        """A copy, or work of another core, that runs beside what follows."""
        host = host_bytes(computation, given)
        amount = 0 if host else moved_beside(computation, given)
        return Event(
            name=instruction.name, key=instruction.name, hbm_bytes=amount, host_bytes=host,
            copies=amount / self.fabric.hardware.hbm_bytes_per_s,
        )  # fmt: skip

    def _cost(
        self, computation: Computation, instruction: Instruction, *, exchanges: bool
    ) -> Event:
        """What computes; the bytes that an exchange moves have a time of their own."""
        hardware = self.fabric.hardware
        if instruction.target in _NO_TIME:
            return Event(name=instruction.name)
        amount = traffic(self.module, computation, instruction)
        by_bytes = 0.0 if exchanges else amount / hardware.hbm_bytes_per_s
        if kernel := kernel_of(computation, instruction):
            cost = self.kernels(kernel)
            seconds = cost.seconds if cost else by_bytes
            flops = cost.flops if cost else 0.0
            note = '' if cost else f'kernel {kernel.name}: not known; its time is that of its bytes'
            return Event(
                name=instruction.name, category='kernels', low=seconds, high=seconds, flops=flops,
                kernel_flops=flops, hbm_bytes=amount, note=note,
            )  # fmt: skip
        cycles = instruction.cycles
        high = by_bytes if cycles is None else cycles / hardware.clock_hz
        found = products(self.module, computation, instruction)
        if not found:
            # The compiler's cycles of these are up to four times what their bytes take.
            low = min(high, by_bytes) if by_bytes else high
            return Event(name=instruction.name, low=low, high=high, hbm_bytes=amount)
        flops = sum(product.flops for product in found)
        at_peak = sum(self._at_peak(product) for product in found)
        low = max(at_peak / PEAK_SHARE, by_bytes)
        high = low if cycles is None else high
        return Event(
            name=instruction.name, category='matmul', low=min(low, high), high=high, flops=flops,
            rematerialized_flops=flops if '.remat' in instruction.name else 0.0, hbm_bytes=amount,
        )  # fmt: skip

    def _at_peak(self, product: Product) -> float:
        """Seconds of a product at the peak of its type."""
        hardware = self.fabric.hardware
        peak = hardware.peak_flops / product.passes
        if product.dtype.startswith('f8'):
            peak = hardware.fp8_flops
        elif re.fullmatch(r'[su][48]', product.dtype):
            peak = hardware.int8_flops
        return product.flops / peak


def _length(events: tuple[Event, ...]) -> float:
    """Seconds of computation."""
    return sum(event.high + event.trips * _length(event.body) for event in events)


def _half(event: Event) -> Event:
    """An event as often as not, but for kernels, whose cost is already that of half the pairs."""
    if event.category == 'kernels':
        return event
    names = ('low', 'high', 'flops', 'rematerialized_flops', 'hbm_bytes')
    parts = {name: getattr(event, name) / 2 for name in names}
    return dataclasses.replace(event, body=tuple(map(_half, event.body)), **parts)


def _made_ready(computation: Computation, instruction: Instruction) -> bool:
    """Whether what starts here gets its operands in an update."""
    if instruction.operands or not instruction.opcode.endswith('-start'):
        return False
    return any(
        other.opcode.endswith('-update') and other.operands[:1] == (instruction.name,)
        for other in computation.instructions.values()
    )


def _begun(computation: Computation, instruction: Instruction) -> str:
    """The key of what a '-done' waits for: what it was started as, updates between."""
    source = instruction
    while source.operands and source.operands[0] in computation.instructions:
        source = computation.instructions[source.operands[0]]
        if source.opcode.endswith('-start'):
            return source.name
        if source.opcode in ('send', 'recv'):
            return _rendezvous(source)
    return ''


def _rendezvous(instruction: Instruction) -> str:
    """What both ends of an exchange across slices call it."""
    found = re.search(
        r'_rendezvous="([^"]*)"', instruction.attributes.get('frontend_attributes', '')
    )
    return f'rendezvous {found[1]}' if found else instruction.name
