"""Leaving in good order: Ctrl-C and SIGTERM end the loop after a step, on all processes alike."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Interrupt:
    """Whether the run was asked to stop.

    Attributes:
      signal: number of the signal that asked, None so far.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def requested(self, call: int) -> bool:
        """Returns whether to stop after `call`; the same answer on every process.

        A preempted job's processes get SIGTERM at different moments. JAX's preemption service
        agrees on one call for all of them: one more than the furthest has made, so that calls
        must be counted without gaps.
        """
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(call):
            self.signal = self.signal or signal.SIGTERM
            return True
        return jax.process_count() == 1 and self.signal is not None


@contextlib.contextmanager
def catch_interrupts() -> Iterator[Interrupt]:
    """Yields an `Interrupt` that the first Ctrl-C or SIGTERM sets; a second Ctrl-C kills.

    With several processes SIGTERM is left to JAX's preemption service, and Ctrl-C becomes one.
    """
    interrupt = Interrupt()

    def handle(number: int, frame: FrameType | None) -> None:
        interrupt.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    caught = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
    before = {number: signal.signal(number, handle) for number in caught}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: a handler not of Python's.
