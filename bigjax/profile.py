"""A trace of some steps for a profiler."""

from pathlib import Path

import jax


class Profile:
    """Writes a trace of the steps FIRST:LAST below `workdir/profile`; open it with TensorBoard."""

    def __init__(self, steps: str, workdir: Path) -> None:
        """Prepares a trace of `steps`, such as `'10:13'` (10, 11 and 12); empty traces nothing."""
        self._first, self._last = map(int, steps.split(':')) if steps else (0, 0)
        self._directory = workdir / 'profile'
        self._tracing = False

    def at(self, step: int) -> None:
        """Starts or stops the trace; call before the steps that follow `step` are dispatched."""
        if self._tracing and step >= self._last:
            self._stop()
        elif not self._tracing and self._first <= step < self._last:
            jax.profiler.start_trace(str(self._directory))
            self._tracing = True

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._tracing, self._last = False, 0

    def __enter__(self) -> 'Profile':
        return self

    def __exit__(self, *_) -> None:
        if self._tracing:
            self._stop()
