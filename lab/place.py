"""Where QEMU runs: what a VM needs of it, and this machine.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import contextlib
import os
import re
import signal
import socket
import stat
import subprocess
from pathlib import Path
from typing import List, Protocol

from . import env
from .console import Console
from .hardware import Hardware
from .host import DIE_WITH_US


class Process(Protocol):
    """A QEMU that runs.  Its monitor and its logs are on this machine.

    console: the guest's second serial port; the first one is its kernel's.
    output: what QEMU itself says.
    """
    monitor: socket.socket
    console: Console
    kernel_log: Path
    output: Path

    def ended(self) -> str:
        """How it has ended, '' if it runs."""

    def end(self) -> None:
        """Kill it and what it has started, close its console and logs."""


class Place(Protocol):
    """Where QEMU runs.

    qemu, stock, qemu_img: programs there; scratch: a folder there.
    hardware: of the VMs there, unless a case wants another.
    patience: how many times what it does here anything may take there.
    """
    qemu: Path
    stock: Path
    qemu_img: Path
    scratch: Path
    hardware: Hardware
    patience: int

    def run(self, command: str) -> List[str]:
        """What a line of shell prints; raises if it fails."""

    def start(self, command: List[str], log: Path) -> Process:
        """Start QEMU; @log: the common beginning of its log files' names."""

    def trouble(self) -> List[str]:
        """New lines of the kernel's log that should not be there."""

    def close(self) -> None:
        """It is no longer used."""


def lines(kernel: str, console: str, monitor: str) -> List[str]:
    """QEMU's options for its lines to us, each as -chardev describes it."""
    return ['-chardev', f'{kernel},id=kernel', '-serial', 'chardev:kernel',
            '-chardev', f'{console},id=lab', '-serial', 'chardev:lab',
            '-chardev', f'{monitor},id=qmp',
            '-mon', 'chardev=qmp,mode=control']


def log_file(log: Path, what: str) -> Path:
    return log.with_name(f'{log.name}.{what}.log')


# Smaller mappings are no RAM.
HEAP_KB = 64 << 10


class LocalProcess:
    """A QEMU on this machine."""

    def __init__(self, command: List[str], log: Path):
        self.kernel_log = log_file(log, 'kernel')
        self.kernel_log.unlink(missing_ok=True)
        # Not by QEMU itself, which may run as somebody else.
        self.kernel_log.touch()
        self.kernel_log.chmod(0o666)
        self.output = log_file(log, 'qemu')
        self.monitor, monitor_far = socket.socketpair()
        serial, serial_far = socket.socketpair()
        with monitor_far, serial_far, self.output.open('wb') as output:
            self._process = subprocess.Popen(
                [*DIE_WITH_US, *command, *lines(
                    f'file,path={self.kernel_log}',
                    f'socket,fd={serial_far.fileno()}',
                    f'socket,fd={monitor_far.fileno()}')],
                pass_fds=(monitor_far.fileno(), serial_far.fileno()),
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True)
        self.pid = self._process.pid
        self.console = Console(serial, log_file(log, 'lines'))
        self._proc = Path(f'/proc/{self.pid}')

    def ended(self) -> str:
        code = self._process.poll()
        return '' if code is None else f'ended with code {code}'

    def end(self) -> None:
        # The whole group: exec: destinations are children of QEMU.
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        self.console.close()

    def mappings(self) -> int:
        """How many mappings the kernel keeps for the process."""
        return len((self._proc / 'maps').read_text().splitlines())

    def threads(self) -> List[str]:
        """Their names, which QEMU's `-name debug-threads=on` tells apart."""
        names = []
        for task in (self._proc / 'task').iterdir():
            with contextlib.suppress(OSError):  # It may have ended.
                names.append((task / 'comm').read_text().strip())
        return names

    def files(self) -> int:
        """How many file descriptors are open."""
        return len(list((self._proc / 'fd').iterdir()))

    def children(self) -> List[int]:
        """The processes that it has started."""
        return [int(pid) for task in (self._proc / 'task').iterdir()
                for pid in (task / 'children').read_text().split()]

    def memory_used(self) -> int:
        """Bytes of the host's memory, and of its files, that QEMU occupies.

        Counted are anonymous memory and the files without a name that QEMU
        has open: those of memfds and of backends whose mem-path is a folder.
        """
        blocks = 0
        for fd in (self._proc / 'fd').iterdir():
            try:
                file = fd.stat()
            except FileNotFoundError:
                continue  # closed by now
            if stat.S_ISREG(file.st_mode) and file.st_nlink == 0:
                blocks += file.st_blocks
        return self.memory('status', 'RssAnon') + blocks * 512

    def heap(self) -> int:
        """Bytes of anonymous memory that are no RAM, nor TCG's code."""
        smaps = (self._proc / 'smaps').read_text()
        return sum(int(anonymous) * 1024 for size, anonymous in re.findall(
            r'^Size:\s+(\d+) kB$.*?^Anonymous:\s+(\d+) kB$', smaps,
            re.M | re.S) if int(size) < HEAP_KB)

    def memory(self, file: str, line: str) -> int:
        """Bytes that a line of a file in /proc/PID tells."""
        [kb] = re.findall(rf'^{line}:\s+(\d+) kB',
                          (self._proc / file).read_text(), re.M)
        return int(kb) * 1024


class Here:
    """This machine."""
    qemu = env.QEMU
    stock = env.STOCK
    qemu_img = env.qemu_img(env.QEMU)
    scratch = env.LAB / 'scratch'
    hardware = Hardware()
    patience = 1

    @staticmethod
    def run(command: str) -> List[str]:
        return subprocess.run(command, shell=True, check=True, text=True,
                              stdout=subprocess.PIPE).stdout.splitlines()

    @staticmethod
    def start(command: List[str], log: Path) -> LocalProcess:
        return LocalProcess(command, log)

    @staticmethod
    def trouble() -> List[str]:
        return []

    def close(self) -> None:
        pass


HERE = Here()
