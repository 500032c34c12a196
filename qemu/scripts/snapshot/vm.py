# SPDX-License-Identifier: GPL-2.0-or-later

"""
A running QEMU as its QMP socket shows it, and the process behind that.
"""

import asyncio
import logging
import os
import socket
import struct
import time
from typing import Any, Awaitable, Dict, List, Optional, Tuple, TypeVar

from qemu.qmp import ExecuteError, QMPClient, QMPError

from .errors import Refused, SnapshotError


Json = Dict[str, Any]
T = TypeVar('T')

# A monitor may have to wait for 10 seconds for a background snapshot
ANSWER_S = 60.0
CONNECT_S = 10.0

# Lost connections are reported by us, in other words
logging.getLogger('qemu.qmp').setLevel(logging.CRITICAL + 1)


def started(pid: int) -> Optional[str]:
    """When a process was started, as the host counts; None if it has ended."""
    try:
        with open(f'/proc/{pid}/stat', encoding='ascii',
                  errors='replace') as file:
            words = file.read().rpartition(')')[2].split()
    except OSError:
        return None
    return None if words[0] in 'ZX' else words[19]


class CommandFailed(SnapshotError):
    """QEMU has refused a command."""

    def __init__(self, command: str, problem: ExecuteError):
        super().__init__(f'{command}: {problem}')
        self.unknown = problem.error_class == 'CommandNotFound'


class MonitorLost(SnapshotError):
    """QEMU no longer answers."""


class VM:
    """A VM that is controlled over QMP.  All names of QMP have a '-'."""

    def __init__(self, address: str):
        self.address = address
        self.pid: Optional[int] = None
        self.started: Optional[str] = None
        self.uuid = ''
        self.cwd = '/'
        self.events: List[Json] = []
        self._client: Optional[QMPClient] = None
        self._claim: Optional[socket.socket] = None
        self._loop = asyncio.new_event_loop()
        try:
            self._connect()
        except (OSError, QMPError, asyncio.TimeoutError) as problem:
            self._loop.close()
            reason = str(problem) or 'no greeting; is another program using it'
            raise Refused(f'cannot connect to {address}: {reason}') from None

    def _sync(self, action: Awaitable[T], seconds: float) -> T:
        return self._loop.run_until_complete(asyncio.wait_for(action, seconds))

    def _connect(self) -> None:
        host, _, port = self.address.rpartition(':')
        tcp = port.isdigit() and '/' not in self.address
        with socket.socket(socket.AF_INET if tcp else socket.AF_UNIX,
                           socket.SOCK_STREAM) as sock:
            sock.settimeout(CONNECT_S)
            sock.connect((host, int(port)) if tcp else self.address)
            if not tcp:
                found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED,
                                        struct.calcsize('3i'))
                self.pid = struct.unpack('3i', found)[0] or None
            client = QMPClient('qemu-snapshot')
            # A monitor that somebody else uses lets us in, but does not greet
            mine = sock.dup()
            mine.setblocking(False)
            self._sync(client.connect(mine), CONNECT_S)
            self._client = client
        if self.pid is not None:
            self.started = started(self.pid)
        # Names of files without a directory are from there
        self.cwd = self.process().get('cwd', '/')
        self.uuid = self.cmd('query-uuid')['UUID']

    def claim(self) -> None:
        """Refuse if another of us is at work on this VM; else keep it away."""
        if self.pid is None:
            return
        # A name that is free again when this program ends, however that is
        self._claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._claim.bind(f'\0qemu-snapshot/{self.pid}/{self.started}')
        except OSError:
            self._claim.close()
            raise Refused('another qemu-snapshot is at work on this VM'
                          ) from None

    def identity(self) -> Json:
        """What tells this run of this VM from any other."""
        return {'pid': self.pid, 'started': self.started, 'uuid': self.uuid}

    def cmd(self, command: str, **arguments: Any) -> Any:
        """Execute a command.  In names of arguments, _ stands for -."""
        if self._client is None:
            raise MonitorLost('the connection to QEMU is closed')
        try:
            return self._sync(self._client.execute(command, {
                name.replace('_', '-'): value
                for name, value in arguments.items()}), ANSWER_S)
        except ExecuteError as problem:
            raise CommandFailed(command, problem) from problem
        except asyncio.TimeoutError:
            raise MonitorLost(f'QEMU has not answered {command} for '
                              f'{ANSWER_S:.0f} s') from None
        except (QMPError, OSError, EOFError) as problem:
            self._hang_up()
            raise MonitorLost('QEMU has closed the connection'
                              + (', it has ended' if self.wait_gone(2)
                                 else '')) from problem

    def wait_event(self, seconds: float) -> None:
        """Let time pass, but not if there are events: these are kept."""
        if self._client is None:
            raise MonitorLost('the connection to QEMU is closed')
        try:
            self.events.append(dict(
                self._sync(self._client.events.get(), seconds)))
            self.events += map(dict, self._client.events.clear())
        except asyncio.TimeoutError:
            pass

    def status(self) -> str:
        """QEMU's run state."""
        return str(self.cmd('query-status')['status'])

    def close(self) -> None:
        """Hang up, for good."""
        self._hang_up()
        self._loop.close()
        if self._claim is not None:
            self._claim.close()

    def _hang_up(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            try:
                self._sync(client.disconnect(), CONNECT_S)
            except (QMPError, OSError, EOFError, asyncio.TimeoutError):
                pass  # QEMU may have been first

    def reconnect(self) -> bool:
        """Connect again to a QEMU that has dropped us."""
        pid = self.pid
        self._hang_up()
        try:
            self._connect()
        except (OSError, QMPError, asyncio.TimeoutError):
            return False
        if pid != self.pid:
            self._hang_up()
            return False
        return True

    # Its process, if it is on this host

    def wait_gone(self, seconds: float) -> bool:
        """Whether QEMU's process is known to have ended."""
        deadline = time.monotonic() + seconds
        while self.pid is not None:
            if started(self.pid) != self.started:
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        return False

    def process(self) -> Json:
        """Command line, directory and binary, as far as they can be seen."""
        try:
            with open(f'/proc/{self.pid}/cmdline', 'rb') as file:
                words = file.read().split(b'\0')[:-1]
            return {'argv': [os.fsdecode(word) for word in words],
                    'cwd': os.readlink(f'/proc/{self.pid}/cwd'),
                    'binary': os.readlink(f'/proc/{self.pid}/exe'
                                          ).replace(' (deleted)', '')}
        except OSError:
            return {}

    def owner(self) -> Optional[Tuple[int, int]]:
        """User and group for which QEMU creates files."""
        status = self._proc_status()
        try:
            return (int(status['Uid'].split()[3]),
                    int(status['Gid'].split()[3]))
        except (KeyError, IndexError, ValueError):
            return None

    def resident(self) -> Optional[int]:
        """Bytes of memory that QEMU has used: no image is much larger."""
        status = self._proc_status()
        try:
            return sum(int(status[key].split()[0]) * 1024
                       for key in ('VmRSS', 'VmSwap', 'HugetlbPages'))
        except (KeyError, IndexError, ValueError):
            return None

    def _proc_status(self) -> Dict[str, str]:
        try:
            with open(f'/proc/{self.pid}/status', encoding='utf-8',
                      errors='replace') as file:
                return dict(line.split(':', 1) for line in file
                            if ':' in line)
        except OSError:
            return {}
