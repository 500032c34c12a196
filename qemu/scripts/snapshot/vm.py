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
import uuid
from typing import Any, Awaitable, Dict, List, Optional, Tuple, TypeVar

from qemu.qmp import ExecuteError, QMPClient, QMPError

from . import rights
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


def here() -> Json:
    """Within what a process ID is that of one process."""
    try:
        with open('/proc/sys/kernel/random/boot_id', encoding='ascii') as file:
            boot = file.read().strip()
        return {'host': socket.gethostname(), 'boot': boot,
                'namespace': os.readlink('/proc/self/ns/pid')}
    except OSError:
        return {'host': socket.gethostname(), 'boot': None, 'namespace': None}


def address_of(text: str) -> Tuple[socket.AddressFamily, Any]:
    """What to connect to."""
    host, _, port = text.rpartition(':')
    if port.isdigit() and '/' not in text:
        return socket.AF_INET, (host, int(port))
    return socket.AF_UNIX, text


def may_run(run: Json) -> Optional[str]:
    """Why a VM may still run that nobody has given; None if it has ended.

    @run: what VM.run() has returned.
    """
    now = here()
    if run['host'] != now['host']:
        return f'it was on the host {run["host"]}'
    if run['boot'] != now['boot']:
        return None
    if run['namespace'] != now['namespace']:
        return 'its processes are not to be seen from here'
    if run['started'] is not None:
        if started(run['pid']) == run['started']:
            return f'process {run["pid"]}'
        try:
            os.kill(run['pid'], 0)
            return None
        except ProcessLookupError:
            return None
        except PermissionError:
            pass  # /proc may be hiding it
    family, address = address_of(run['address'])
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(CONNECT_S)
        try:
            probe.connect(address)
            return f'somebody answers at {run["address"]}'
        except (ConnectionRefusedError, FileNotFoundError):
            return None
        except OSError as problem:
            return f'{run["address"]}: {problem}'


def new_mark() -> str:
    """A name for one run of a VM."""
    return f'qemu-snapshot-{uuid.uuid4().hex}'


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
        # Where names without a directory are from; None: nobody tells
        self.cwd: Optional[str] = None
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
        family, address = address_of(self.address)
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.settimeout(CONNECT_S)
            sock.connect(address)
            if family == socket.AF_UNIX:
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
        self.cwd = self.process().get('cwd', self.cwd)

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

    def run(self) -> Json:
        """What tells later whether this run of the VM has ended."""
        local = address_of(self.address)[0] == socket.AF_UNIX
        return dict(here(), pid=self.pid, started=self.started,
                    address=(os.path.abspath(self.address) if local
                             else self.address), cwd=self.cwd)

    def mark(self, mark: str) -> None:
        """Have this run of the VM be known again, by what new_mark() returned.

        The mark is in the VM until that ends.  All else that could tell one
        from another depends on where the VM is looked at from.
        """
        self.cmd('object-add', qom_type='secret', id=mark, data='-')

    def has_mark(self, mark: Optional[str]) -> bool:
        """Whether this is the run of a VM that was marked so."""
        return any(child['name'] == mark for child
                   in self.cmd('qom-list', path='/objects'))

    def unmark(self, mark: str) -> None:
        """Forget a mark, if it is there."""
        if self.has_mark(mark):
            self.cmd('object-del', id=mark)

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

    def reconnect(self, mark: str) -> bool:
        """Connect again to the very QEMU that has dropped us."""
        self._hang_up()
        try:
            self._connect()
            if self.has_mark(mark):
                return True
        except (OSError, QMPError, asyncio.TimeoutError, SnapshotError):
            pass
        self._hang_up()
        return False

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

    def user(self) -> Optional[rights.User]:
        """With whose rights to open files for QEMU, if not with ours."""
        owner = self.owner()
        if owner is None:
            return None
        groups = self._proc_status().get('Groups', '').split()
        return rights.user(*owner, [int(group) for group in groups])

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
