"""What command lines share: where progress goes, and what a signal does."""

from __future__ import annotations

import signal
import threading

import pytest

from s2d.console import interruptible, say


def test_progress_goes_to_stderr(capsys):
    say("one")
    say("two\nthree")
    assert capsys.readouterr() == ("", "one\ntwo\nthree\n")


@pytest.fixture
def handlers():
    """Handlers of our own for both signals, so that the test runner's, or ignored ones, play no part."""
    received = []
    before = {n: signal.signal(n, lambda number, _: received.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    yield received
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_interrupts_and_more_are_ignored(handlers, number):
    cleaned = []
    with pytest.raises(KeyboardInterrupt), interruptible():
        try:
            signal.raise_signal(number)
        finally:
            for again in (signal.SIGINT, signal.SIGTERM):
                signal.raise_signal(again)
            cleaned.append("up")
    assert cleaned == ["up"] and handlers == []
    signal.raise_signal(number)
    assert handlers == [number]  # as before


def test_an_ignored_signal_stays_ignored(handlers):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with interruptible():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(signal.SIGINT)


def test_outside_the_main_thread_nothing_changes(handlers):
    done = []

    def work():
        with interruptible():
            done.append(signal.getsignal(signal.SIGINT))

    expected = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [expected]
