"""Walks the schedule of a compiled program: what it computes, moves and waits for, and how long."""

import dataclasses
from collections.abc import Mapping, Sequence

from bigjax import units
from bigjax.plan.hardware import HARDWARE, Hardware
from bigjax.plan.program.collectives import Exchange
from bigjax.plan.program.events import Event, Reader
from bigjax.plan.program.fabric import make_fabric
from bigjax.plan.program.hlo import parse
from bigjax.plan.program.kernels import Kernels
from bigjax.plan.records import Collective, Timeline, Walk

Row = tuple[str, tuple[str, ...], str]  # kind, axes, network


@dataclasses.dataclass
class Clock:
    """The time, and what is under way.

    Attributes:
      slow: whether costs are the compiler's cycles.
      now: seconds since the start.
      spent: seconds by category.
      hidden: seconds of exchanges that something hid.
      exposed: seconds of exchanges that nothing hid, by row.
      free: when each lane is free.
      pending: by key, what began, and when it ends.
    """

    slow: bool
    now: float = 0.0
    spent: dict[str, float] = dataclasses.field(default_factory=dict)
    hidden: float = 0.0
    exposed: dict[Row, float] = dataclasses.field(default_factory=dict)
    free: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    pending: dict[str, tuple[Exchange | None, float, float]] = dataclasses.field(
        default_factory=dict
    )

    def run(self, events: Sequence[Event]) -> 'Clock':
        """Goes through events in their order, and waits for what is still under way."""
        for event in events:
            self._pass(event)
        for key in list(self.pending):
            self._wait(key)
        return self

    def _pass(self, event: Event) -> None:
        if event.body:
            self._repeat(event)
        if event.ends:
            self._wait(event.ends)
        if event.begins:
            self._begin(event.key, event.begins, event.begins.seconds, event.begins.lanes)
        elif event.copies:
            # Copies between HBM and VMEM share the memory's rate.
            self._begin(event.key, None, event.copies, (('memory', ''),))
        self._spend(event.category, event.high if self.slow else event.low)

    def _spend(self, category: str, seconds: float) -> None:
        self.now += seconds
        self.spent[category] = self.spent.get(category, 0.0) + seconds

    def _begin(
        self, key: str, moved: Exchange | None, seconds: float, lanes: Sequence[tuple[str, str]]
    ) -> None:
        start = max([self.now, *(self.free.get(lane, 0.0) for lane in lanes)])
        self.free.update(dict.fromkeys(lanes, start + seconds))
        self.pending[key] = (moved, start + seconds, seconds)

    def _wait(self, key: str) -> None:
        moved, end, seconds = self.pending.pop(key, (None, 0.0, 0.0))
        waited = max(0.0, end - self.now)
        if moved is None:
            self._spend('other', waited)
            return
        self.now += waited
        row = (moved.kind, moved.axes, moved.network)
        self.exposed[row] = self.exposed.get(row, 0.0) + waited
        # What is left of a sum of floats is no time.
        self.hidden += seconds - waited if waited < (1 - 1e-6) * seconds else 0.0

    def _repeat(self, event: Event) -> None:
        """One trip stands for all: nothing is under way from one to the next."""
        trip = Clock(self.slow).run(event.body)
        self.now += event.trips * trip.now
        self.hidden += event.trips * trip.hidden
        for category, seconds in trip.spent.items():
            self.spent[category] = self.spent.get(category, 0.0) + event.trips * seconds
        for row, seconds in trip.exposed.items():
            self.exposed[row] = self.exposed.get(row, 0.0) + event.trips * seconds

    def timeline(self) -> Timeline:
        """Returns the seconds by category."""
        matmul, kernels, other = (self.spent.get(c, 0.0) for c in ('matmul', 'kernels', 'other'))
        return Timeline(matmul, kernels, other, sum(self.exposed.values()), self.hidden)


@dataclasses.dataclass
class Sums:
    """What a program does in all, loops with their trips."""

    flops: float = 0.0
    kernel_flops: float = 0.0
    rematerialized_flops: float = 0.0
    hbm_bytes: float = 0.0
    host_bytes: float = 0.0
    rows: dict[Row, list[float]] = dataclasses.field(default_factory=dict)
    notes: dict[str, None] = dataclasses.field(default_factory=dict)

    def add(self, events: Sequence[Event], times: float = 1.0) -> 'Sums':
        """Adds events that run so many times."""
        for event in events:
            self.flops += times * event.flops
            self.kernel_flops += times * event.kernel_flops
            self.rematerialized_flops += times * event.rematerialized_flops
            self.hbm_bytes += times * event.hbm_bytes
            self.host_bytes += times * event.host_bytes
            if event.note:
                self.notes[event.note] = None
            if moved := event.begins:
                row = self.rows.setdefault((moved.kind, moved.axes, moved.network), [0.0] * 3)
                for i, value in enumerate((moved.bytes, 1.0, moved.seconds)):
                    row[i] += times * value
            self.add(event.body, times * event.trips)
        return self


def walk(
    hlo_text: str,
    *,
    chip: str | Hardware,
    mesh_shape: Mapping[str, int],
    kernels: Kernels,
    device_ids: Sequence[int] | None = None,
    dcn_axes: Mapping[str, int] | None = None,
    coordinates: Sequence[tuple[int, ...]] = (),
    wrap: Sequence[bool] = (),
) -> Walk:
    """Returns what a compiled program says of one step of one device.

    Args:
      hlo_text: the optimised, scheduled program, `jax.stages.Compiled.as_text()`.
      chip: the generation, or its name in `bigjax.plan.hardware.HARDWARE`.
      mesh_shape: sizes of the mesh's axes, outermost first.
      kernels: what Pallas kernels take, as from `bigjax.plan.program.kernels.from_table`.
      device_ids: the numbers that replica groups call the devices by, in the mesh's order; None
        counts them in that order, as JAX does.
      dcn_axes: parts of axes that cross slices, such as {'data': 2}.
      coordinates: of each device of the mesh, in its order, in the torus of its slice.
      wrap: which sides of that torus are rings.

    Raises:
      ValueError: the text cannot be read.
    """
    module = parse(hlo_text)
    hardware = HARDWARE[chip] if isinstance(chip, str) else chip
    fabric = make_fabric(
        hardware, mesh_shape, device_ids=device_ids, dcn_axes=dcn_axes, coordinates=coordinates,
        wrap=wrap, partitions=module.partitions,
    )  # fmt: skip
    events = Reader(module, fabric, kernels).events(module.entry, lambda _: None)
    low, high = (Clock(slow).run(events) for slow in (False, True))
    sums = Sums().add(events)
    if sums.host_bytes:
        moved = units.size(sums.host_bytes)
        sums.notes[f'{moved} to and from the memory of the host: its time is not counted'] = None
    return Walk(
        low=low.timeline(),
        high=high.timeline(),
        flops=sums.flops,
        kernel_flops=sums.kernel_flops,
        hbm_bytes=sums.hbm_bytes,
        collectives=_collectives(sums, low, high),
        rematerialized_flops=sums.rematerialized_flops,
        notes=tuple(sums.notes),
    )


def _collectives(sums: Sums, low: Clock, high: Clock) -> tuple[Collective, ...]:
    """Rows, the longest first; what is exposed is the mean of both timelines."""
    found = []
    for (kind, axes, network), (sent, count, seconds) in sums.rows.items():
        exposed = [clock.exposed.get((kind, axes, network), 0.0) for clock in (low, high)]
        found.append(
            Collective(
                kind=kind, axes=axes, bytes=sent, count=count, network=network, seconds=seconds,
                exposed_seconds=sum(exposed) / 2,
            )
        )  # fmt: skip
    return tuple(sorted(found, key=lambda row: -row.seconds))
