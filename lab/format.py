"""How RAM stands in an image.

SPDX-License-Identifier: GPL-2.0-or-later
"""
from typing import NamedTuple

from .vm import VM


class Format(NamedTuple):
    """A stream, or (mapped) mapped-ram: each page has its place in the file.

    channels: threads that write or read it at a time, 0: no multifd;
    direct: whether they pass by the page cache;
    offset: where the image begins in its file.
    """
    mapped: bool = False
    channels: int = 0
    direct: bool = False
    offset: int = 0

    def choose(self, vm: VM) -> None:
        """For the next migration from or to @vm."""
        vm.qmp.cmd('migrate-set-parameters',
                   multifd_channels=max(1, self.channels),
                   direct_io=self.direct)
        vm.qmp.cmd('migrate-set-capabilities', capabilities=[
            {'capability': name, 'state': bool(state)} for name, state in
            (('mapped-ram', self.mapped), ('multifd', self.channels))])

    def uri(self, file: str) -> str:
        return f'file:{file}' + (f',offset={self.offset}' if self.offset
                                 else '')


STREAM = Format()
FORMATS = {
    'mapped': Format(mapped=True),
    'parallel': Format(mapped=True, channels=3),
    'direct': Format(mapped=True, channels=2, direct=True),
}
