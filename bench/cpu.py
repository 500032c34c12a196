"""How much of the machine others use while something is measured.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import os
import time
from pathlib import Path
from typing import Tuple


class OtherLoad:
    """From its creation on, CPUs kept busy by neither @pid nor ourselves."""

    def __init__(self, pid: int):
        self._pid = pid
        self._began = time.monotonic()
        self._busy, self._own = self._read()

    def cpus(self, own_s: float) -> float:
        """The number of CPUs that others have used, on average, until now.

        Without the @own_s seconds of CPU time that our sink took.
        """
        busy, own = self._read()
        ticks = (busy - self._busy) - (own - self._own)
        seconds = time.monotonic() - self._began
        return max(0.0, (ticks / os.sysconf('SC_CLK_TCK') - own_s) / seconds)

    def _read(self) -> Tuple[int, int]:
        user, nice, system, _, _, irq, softirq = map(
            int, Path('/proc/stat').read_text().split()[1:8])
        own = 0
        for pid in (self._pid, os.getpid()):
            # The name before the last bracket may have spaces in it.
            stat = Path(f'/proc/{pid}/stat').read_text()
            fields = stat.rpartition(')')[2].split()
            own += int(fields[11]) + int(fields[12])
        return user + nice + system + irq + softirq, own
