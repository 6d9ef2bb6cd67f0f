"""What a piece of work costs: seconds, and bytes of memory beyond what was held before."""

from __future__ import annotations

import pathlib
import resource
import threading
import time

import jax

_STATUS = pathlib.Path('/proc/self/statm')
_SAMPLE_SECONDS = 0.002


class Meter:
    """Context manager that measures what happens within it.

    Attributes:
      seconds: wall time.
      bytes: the largest growth of memory: of the first accelerator as it reports it, or of this
        process, sampled. Memory that the allocator held in reserve does not count as growth.
        Without /proc it is the growth of the process's peak, a lower bound.
    """

    seconds = 0.0
    bytes = 0

    def __enter__(self) -> Meter:
        self.bytes, self._before = 0, _held()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        self.seconds = time.perf_counter() - self._start
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.bytes = max(self.bytes, _held() - self._before)
            if self._stop.wait(_SAMPLE_SECONDS):
                return


def _held() -> int:
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats['bytes_in_use']
    if not _STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes, as macOS counts it
    return int(_STATUS.read_text().split()[1]) * resource.getpagesize()
