"""Programs in the guest that check themselves, driven from the host.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import re
import time
from dataclasses import dataclass

from .console import GuestError
from .vm import VM

START_TIMEOUT = 120
ROUND_TIMEOUT = 120


@dataclass
class SelfCheck:
    """guest/selfcheck.c: sizes in MiB; pause_us is slept after 64 pages.

    stride: pages from one write to the next; 0: ways that vary.
    proof: how many rounds of each thread are enough to have seen all.
    """
    write_mb: int = 96
    static_mb: int = 24
    pause_us: int = 0
    stride: int = 0
    proof: int = 2

    def start(self, vm: VM) -> None:
        mark = vm.console.mark()
        vm.console.run(f'selfcheck {vm.hardware.vcpus} {self.write_mb} '
                       f'{self.static_mb} {self.pause_us} '
                       f'{self.stride} &')
        vm.console.wait(r'^self round=\d+ .*ok', mark, START_TIMEOUT)

    def prove(self, vm: VM) -> None:
        """Let each thread do whole rounds without a mismatch."""
        mark = vm.console.mark()
        now = vm.console.wait(r'^self round=(\d+) .*ok', mark, ROUND_TIMEOUT)
        # One more, since a round was going on.
        _reach(vm, r'^self round=(\d+) .*ok',
               int(now.group(1)) + self.proof + 1)

    def last_round(self, vm: VM) -> int:
        """How many rounds the guest has last reported as done."""
        found = [re.match(r'self round=(\d+)', line)
                 for line in vm.console.lines()]
        return max(int(f.group(1)) for f in found if f)

    def moves(self, vm: VM) -> None:
        """See the guest write pages now."""
        mark = vm.console.mark()
        now = vm.console.wait(r'^self .*pages=(\d+) ok', mark, START_TIMEOUT)
        _reach(vm, r'^self .*pages=(\d+) ok', int(now.group(1)) + 1)

    def speed(self, vm: VM, seconds: float = 2) -> float:
        """Pages that the guest writes in a second, over about @seconds."""
        counts = []
        for _ in range(2):
            found = vm.console.wait(r'^self .*pages=(\d+) ok',
                                    vm.console.mark(), START_TIMEOUT)
            counts.append((int(found.group(1)), time.monotonic()))
            time.sleep(0 if len(counts) > 1 else seconds)
        (pages, began), (more, ended) = counts
        return (more - pages) / (ended - began)


@dataclass
class DiskCheck:
    """guest/diskcheck.c: sizes in MiB."""
    disk_mb: int = 32
    ring_mb: int = 8
    device: str = '/dev/vda'

    @property
    def _done(self) -> str:
        return rf'^disk {self.device} ios=(\d+) ok'

    def start(self, vm: VM) -> None:
        mark = vm.console.mark()
        vm.console.run(f'diskcheck {self.device} {self.disk_mb} '
                       f'{self.ring_mb} &')
        vm.console.wait(self._done, mark, START_TIMEOUT)

    def prove(self, vm: VM) -> None:
        """Let it read and write enough to have gone through its ring."""
        mark = vm.console.mark()
        now = vm.console.wait(self._done, mark, ROUND_TIMEOUT)
        _reach(vm, self._done, int(now.group(1)) + self.ring_mb * 60)


def _reach(vm: VM, pattern: str, goal: int) -> None:
    """Wait until the number in the lines that match is @goal or more."""
    deadline = time.monotonic() + ROUND_TIMEOUT
    while True:
        found = vm.console.wait(pattern, vm.console.mark(), ROUND_TIMEOUT)
        if int(found.group(1)) >= goal:
            return
        if time.monotonic() > deadline:
            raise GuestError(f'"{pattern}": {found.group(1)} after '
                             f'{ROUND_TIMEOUT} s, expected {goal}')
