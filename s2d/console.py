"""What the command lines of this package share: progress on stderr, and interruptions that leave nothing half-done."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def say(text: str) -> None:
    """Print progress, a warning or an error: to stderr, at once, so that stdout holds the result alone.

    Args:
        text: one line or several.

    Example:
        >>> say("loading ...")

    Paper: none
    """
    print(text, file=sys.stderr, flush=True)


def exit_code(action: Callable[[], object]) -> int:
    """Run a command, and say what stopped it in one line.

    Args:
        action: reads its arguments and does the work.

    Returns:
        0 all well; 1 failed; 2 bad input (ValueError); 130 interrupted.

    Example:
        >>> exit_code(lambda: None)
        0

    Paper: none
    """
    try:
        with interruptible():
            action()
        return 0
    except ValueError as error:
        say(f"error: {error}")
        return 2
    except (ImportError, OSError, RuntimeError) as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into KeyboardInterrupt and ignore more, so that cleaning up is not cut short.

    A signal the caller had ignored (``nohup``) stays ignored. Outside the main thread, which alone may set handlers,
    nothing is changed.

    Raises:
        KeyboardInterrupt: in the block, when a signal comes.

    Example:
        >>> with interruptible():
        ...     print("writing, and cleaning up if a signal comes")
        writing, and cleaning up if a signal comes

    Paper: none
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}

    def interrupt(number: int, frame: object) -> None:
        for handled in before:
            signal.signal(handled, signal.SIG_IGN)
        raise KeyboardInterrupt

    try:
        for number in before:
            signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
