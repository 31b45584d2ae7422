"""Real signals, sent to this process."""

import contextlib
import os
import signal
import time

import pytest

from bigjax.interrupt import catch_interrupts

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # Python runs handlers between two instructions of the main thread.


@pytest.fixture
def handlers():
    """Those of before, found again after."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_nothing_is_requested_at_first(handlers):
    with catch_interrupts() as interrupt:
        assert interrupt.signal is None
        assert not interrupt.requested(1)


@pytest.mark.parametrize('number', SIGNALS)
def test_the_first_signal_asks(handlers, number):
    with catch_interrupts() as interrupt:
        send(number)
        assert interrupt.signal == number
        assert interrupt.requested(1)
        assert interrupt.requested(2)


@pytest.mark.parametrize('first', SIGNALS)
def test_a_second_ctrl_c_kills(handlers, first):
    with catch_interrupts() as interrupt:
        send(first)
        assert interrupt.requested(1)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_a_second_sigterm_does_not(handlers):
    with catch_interrupts() as interrupt:
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert interrupt.requested(1)


def test_handlers_come_back_after_an_error(handlers):
    with contextlib.suppress(ZeroDivisionError), catch_interrupts():
        assert signal.getsignal(signal.SIGTERM) != handlers[1]
        raise ZeroDivisionError


def test_one_run_after_another(handlers):
    with catch_interrupts() as first:
        send(signal.SIGTERM)
    with catch_interrupts() as second:
        assert first.requested(1)
        assert not second.requested(1)
