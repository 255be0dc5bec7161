"""A bound on the memory and the time that a refusal may take."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 10
MEGABYTES = 300


@contextmanager
def bounded(megabytes: int = MEGABYTES, seconds: float = SECONDS) -> Iterator[None]:
    """Fails where the body adds more to the peak of resident memory, or takes longer; it is stopped at twice that."""

    def stop(*_: object) -> None:
        raise AssertionError(f"still at it after {2 * seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 2 * seconds)
    began, before = time.monotonic(), _peak(reset=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    took, added = time.monotonic() - began, (_peak() - before) >> 20
    assert took <= seconds, f"{took:.1f} s"
    assert added <= megabytes, f"{added} MiB"


def _peak(reset: bool = False) -> int:
    """The largest resident memory so far, in bytes; 0 where the system does not tell."""
    if sys.platform != "linux":
        return 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10
