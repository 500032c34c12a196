"""A QMP connection on qemu.qmp that keeps every event until it is asked for.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import asyncio
import os
import socket
import time
from typing import Any, Callable, Dict, List, Tuple

from . import env  # noqa: F401  (makes qemu.qmp importable)
from qemu.qmp import ExecuteError, QMPError  # noqa: F401
from qemu.qmp.legacy import QEMUMonitorProtocol

Event = Dict[str, Any]


class Qmp:
    """Synchronous QMP; a command that is not answered in time raises."""

    def __init__(self, sock: socket.socket, timeout: float = 60):
        self._monitor = QEMUMonitorProtocol(sock)
        self._monitor.settimeout(timeout)
        self._monitor.connect()
        self.events: List[Event] = []
        self._fdsets: Dict[Tuple[int, int], int] = {}

    def cmd(self, name: str, **arguments: Any) -> Any:
        """Execute a command.  In names of arguments, _ stands for -."""
        return self._monitor.cmd(name, **{k.replace('_', '-'): v for k, v
                                          in arguments.items()})

    def send_fd(self, fd: int, name: str) -> None:
        """Give QEMU a file descriptor under a name, for fd:<name>."""
        self._monitor.send_fd_scm(fd)
        self.cmd('getfd', fdname=name)

    def add_fd(self, fd: int) -> int:
        """Give QEMU a file descriptor, which is closed here.

        Returns the number N of its set, /dev/fdset/N; those of one file get
        into one set.
        """
        where = os.fstat(fd)
        number = self._fdsets.setdefault((where.st_dev, where.st_ino),
                                         len(self._fdsets))
        self._monitor.send_fd_scm(fd)
        os.close(fd)
        self.cmd('add-fd', fdset_id=number)
        return number

    def mark(self) -> int:
        """A position in the stream of events, for wait_event()."""
        self._pull(0)
        return len(self.events)

    def wait_event(self, since: int, what: str,
                   accept: Callable[[Event], bool], timeout: float) -> Event:
        """The first event after the mark @since that @accept takes.

        @what is for the error message; timeout is in seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            for event in self.events[since:]:
                if accept(event):
                    return event
            since = len(self.events)
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f'no {what} within {timeout:.0f} s')
            self._pull(left)

    def close(self) -> None:
        try:
            self._monitor.close()
        except (QMPError, EOFError, OSError, asyncio.TimeoutError):
            pass  # QEMU may have closed it first.

    def _pull(self, timeout: float) -> None:
        try:
            self.events += self._monitor.get_events(float(timeout))
        except asyncio.TimeoutError:
            pass


def event_time(event: Event) -> float:
    """When QEMU sent the event, in seconds."""
    stamp = event['timestamp']
    return stamp['seconds'] + stamp['microseconds'] / 1e6
