"""What is used of the machine's CPUs while something is measured.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import os
import time
from pathlib import Path
from typing import Any, Dict, Tuple

TICKS_S = os.sysconf('SC_CLK_TCK')


def seconds(stat: Path) -> float:
    """The CPU time that a process or thread has used, from its stat file."""
    # The name before the last bracket may have spaces in it.
    fields = stat.read_text().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_S


class Cpu:
    """The CPU time of a QEMU and of others from its creation on.

    QEMU's threads need debug-threads=on to have names.
    """

    def __init__(self, pid: int):
        self._process = Path(f'/proc/{pid}')
        self._began = time.monotonic()
        self._busy, self._own = self._read()
        self._all, self._vcpus = self._threads()

    def used(self, sink_s: float) -> Dict[str, Any]:
        """Until now; @sink_s seconds of CPU time are our sink's.

        vcpus_s: seconds that vCPU threads took; saving_s: that QEMU's others
        did, also those that have ended; others: the number of CPUs that
        neither QEMU nor we have used, on average.
        """
        busy, own = self._read()
        passed = time.monotonic() - self._began
        others = (busy - self._busy) - (own - self._own) - sink_s
        total, vcpus = self._threads()
        vcpus -= self._vcpus
        return {'vcpus_s': vcpus, 'saving_s': total - self._all - vcpus,
                'others': max(0.0, others / passed)}

    def _read(self) -> Tuple[float, float]:
        user, nice, system, _, _, irq, softirq = map(
            int, Path('/proc/stat').read_text().split()[1:8])
        own = sum(seconds(process / 'stat') for process
                  in (self._process, Path('/proc/self')))
        return (user + nice + system + irq + softirq) / TICKS_S, own

    def _threads(self) -> Tuple[float, float]:
        vcpus = 0.0
        for thread in (self._process / 'task').iterdir():
            try:
                if (thread / 'comm').read_text().startswith('CPU '):
                    vcpus += seconds(thread / 'stat')
            except (FileNotFoundError, ProcessLookupError):
                pass  # has ended by now
        return seconds(self._process / 'stat'), vcpus
