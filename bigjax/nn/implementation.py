"""Which implementation of a kernel runs, as a flag names it."""

from collections.abc import Callable
from typing import Any, Literal

from bigjax.experiment import UsageError
from pallas_kernels.chip import current_chip

Implementation = Literal['auto', 'reference', 'xla', 'tpu', 'gpu']

# Plain array code is partitioned by the compiler, whatever divides what; a kernel is not.
_PLAIN = ('reference', 'xla')


def plain(impl: Implementation) -> bool:
    """Whether that is plain array code."""
    return impl in _PLAIN or (impl == 'auto' and current_chip() is None)


def named(call: Callable[..., Any], impl: Implementation, flag: str) -> Callable[..., Any]:
    """Returns `call` with `impl`, whose refusal is told in terms of the flag that named it."""

    def run(*arrays: Any, **features: Any) -> Any:
        try:
            return call(*arrays, impl=None if impl == 'auto' else impl, **features)
        except ValueError as error:
            start = f"impl='{impl}': "
            if not str(error).startswith(start):
                raise
            reason = str(error).removeprefix(start).replace("impl='xla'", f'--{flag}=xla')
            raise UsageError(f'--{flag}={impl}: {reason}') from None

    return run
