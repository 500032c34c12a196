"""A destination as slow, and as uneven, as storage with a limit.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import os
import threading
import time

from lab.vm import VM

CHUNK = 1 << 20


class BurstSink:
    """A pipe that takes @mb_per_s (10^6 bytes), in bursts.

    It takes what it may take in @burst_ms as fast as it comes, then nothing
    until those milliseconds are over; what was not used is lost.  Storage
    with a limit does the same: Linux's io.max hands out its bytes for 100 ms
    at a time, and writers of dirty pages are paused for up to 200 ms.  What
    arrives is counted and thrown away.
    """

    def __init__(self, mb_per_s: float, burst_ms: int):
        self.received = 0
        self._burst = int(mb_per_s * 1e3 * burst_ms)
        self._seconds = burst_ms / 1e3

    def uri(self, vm: VM) -> str:
        reader, writer = os.pipe()
        try:
            vm.qmp.send_fd(writer, 'sink')
        finally:
            os.close(writer)
        self._thread = threading.Thread(target=self._drain, args=(reader,),
                                        daemon=True)
        self._thread.start()
        return 'fd:sink'

    def finish(self) -> int:
        """Wait for the end of the stream.  Returns how long it was."""
        self._thread.join(60)
        if self._thread.is_alive():
            raise TimeoutError('the stream does not end')
        return self.received

    def _drain(self, fd: int) -> None:
        end = time.monotonic() + self._seconds
        left = self._burst
        data = b'the beginning'
        while data:
            data = os.read(fd, min(CHUNK, left))
            self.received += len(data)
            left -= len(data)
            now = time.monotonic()
            if left == 0:
                time.sleep(max(0, end - now))
            if left == 0 or now >= end:
                end = max(end, now) + self._seconds
                left = self._burst
        os.close(fd)
