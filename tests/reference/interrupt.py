"""Ctrl-C as in a terminal, also where the tests run in the background of a shell, which ignores it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def ctrl_c(after: float) -> Iterator[None]:
    """Pressed after so many seconds."""
    timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT))
    with interruptible():
        timer.start()
        try:
            yield
        finally:
            timer.cancel()  # a search that ended early must not take the test run with it
