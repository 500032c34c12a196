"""How much memory of the host QEMU has, and how much of it in huge pages.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import re
import threading
import time
from pathlib import Path
from typing import Any, Dict, List, Tuple

SAMPLE_S = 0.02


def field(text: str, name: str) -> int:
    """The bytes that a line of /proc/PID/status tells."""
    [kb] = re.findall(rf'^{name}:\s+(\d+) kB$', text, re.M)
    return int(kb) * 1024


def huge_pages(smaps: str, begin: int, end: int) -> int:
    """Bytes in huge pages, of the mappings in an area, in /proc/PID/smaps.

    A mapping that is partly outside counts whole: the kernel does not tell
    how much of it is in.
    """
    total, inside = 0, False
    for line in smaps.splitlines():
        head = re.match(r'([0-9a-f]+)-([0-9a-f]+) ', line)
        if head:
            inside = (int(head[1], 16) < end and int(head[2], 16) > begin)
        elif inside and line.startswith('AnonHugePages:'):
            total += int(line.split()[1]) * 1024
    return total


def largest_block(ramblock: str) -> Tuple[int, int]:
    """Where the largest block is in QEMU's memory, in HMP's `info ramblock`."""
    blocks = [(int(used, 16), int(address, 16)) for used, address in re.findall(
        r' (0x\w+) +0x\w+ +(0x\w+) +r', ramblock)]
    size, begin = max(blocks)
    return begin, begin + size


class Memory:
    """Watches a VM from its creation until finish()."""

    def __init__(self, vm):
        self._process = Path(f'/proc/{vm.process.pid}')
        self._area = largest_block(vm.qmp.cmd(
            'human-monitor-command', command_line='info ramblock'))
        self._looks: Dict[str, Any] = {}
        self._samples: List[Tuple[float, int, int]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def look(self, name: str) -> None:
        """Keep what it is now under @name."""
        _, anonymous, tables = self._sample()
        self._looks[name] = {
            'anonymous': anonymous, 'page_tables': tables,
            'huge': huge_pages((self._process / 'smaps').read_text(),
                               *self._area)}

    def finish(self) -> Dict[str, Any]:
        """The looks by name, and all samples.

        A sample is its time by time.monotonic(), the bytes of anonymous
        memory and those of page tables.
        """
        self._over.set()
        self._thread.join()
        return {**self._looks, 'samples': self._samples}

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_S):
            try:
                self._samples.append(self._sample())
            except (FileNotFoundError, ProcessLookupError, ValueError):
                return  # QEMU has ended

    def _sample(self) -> Tuple[float, int, int]:
        # Unlike smaps, this neither walks page tables nor takes their lock.
        status = (self._process / 'status').read_text()
        return (time.monotonic(), field(status, 'RssAnon'),
                field(status, 'VmPTE'))
