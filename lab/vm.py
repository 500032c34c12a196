"""Starts and ends virtual machines.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import re
from pathlib import Path
from typing import Callable, List, Sequence

from .hardware import Hardware
from .place import HERE, Place
from .qmp import Qmp

TROUBLE = ('BUG:', 'WARNING:', 'Oops', 'Kernel panic', 'I/O error',
           'EXT4-fs error', 'lab: ')
TCG_BUG = '(iotlb_to_section|msix_table_mmio_write): Assertion'
QMP_S, BOOT_S = 60, 60


class VM:
    """A running QEMU.  Use as a context manager: leaving it ends QEMU.

    binary: which QEMU, at @place; log: the common beginning of its log files'
    names; launcher: a command that executes QEMU.
    """

    def __init__(self, binary: Path, hardware: Hardware, log: Path,
                 *more: str, place: Place = HERE,
                 launcher: Sequence[str] = ()):
        self.binary = binary
        self.hardware = hardware
        self.place = place
        self.process = place.start(
            [*launcher, str(binary), *hardware.arguments(), '-no-shutdown',
             *more], log)
        self.console = self.process.console
        self.output = self.process.output
        try:
            self.qmp = Qmp(self.process.monitor, QMP_S * place.patience)
        except BaseException as problem:
            self.process.end()
            raise RuntimeError(f'{binary.name} did not start: '
                               + self.last_output()) from problem

    def __enter__(self) -> 'VM':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_boot(self, since: int = 0) -> None:
        self.console.wait('guest ready', since, BOOT_S * self.place.patience)

    def status(self) -> str:
        """QEMU's run state."""
        return self.qmp.cmd('query-status')['status']

    def expect_status(self, expected: str) -> None:
        status = self.status()
        if status != expected:
            raise AssertionError(f'VM is {status}, expected {expected}')

    def kernel_trouble(self) -> List[str]:
        return kernel_trouble(self.process.kernel_log)

    def assert_alive(self) -> None:
        """Raise RuntimeError with QEMU's last words if it has ended."""
        how = self.process.ended()
        if how:
            raise RuntimeError(f'{self.binary.name} {how}: '
                               + self.last_output())

    def close(self) -> None:
        self.qmp.close()
        self.process.end()

    def last_output(self) -> str:
        """QEMU's last words."""
        text = self.output.read_text(errors='replace').strip()
        return ' | '.join(text.splitlines()[-5:]) or 'it said nothing'


def kernel_trouble(log: Path) -> List[str]:
    """Lines of a guest's kernel log that should not be there."""
    return [line for line in log.read_text(errors='replace').splitlines()
            if any(word in line for word in TROUBLE)]


def boot(start: Callable[[], VM], ready: str = 'guest ready',
         timeout: float = BOOT_S) -> VM:
    """A VM whose guest says that it is @ready.

    QEMU 10.0's TCG uses a wrong entry of its map of devices, about once in 100
    boots with several CPUs, modified or not: then the VM is started again.
    """
    for tries_left in (2, 1, 0):
        vm = start()
        try:
            vm.console.wait(ready, 0, timeout * vm.place.patience)
            break
        except BaseException:
            vm.close()
            if not tries_left or not re.search(TCG_BUG, vm.last_output()):
                raise
    return vm
