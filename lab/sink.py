"""Destinations for a snapshot.

Each sink gives a URI for `migrate`, and finish() returns the image's path once
everything has arrived.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import os
import shlex
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Optional

from .vm import VM

CHUNK = 1 << 20


class FileSink:
    """QEMU writes the file itself."""

    def __init__(self, path: Path):
        self.path = path

    def uri(self, _vm: VM) -> str:
        return f'file:{self.path}'

    def finish(self, _timeout: float = 60) -> Path:
        return self.path


class ExecSink:
    """A shell command's standard input.

    Without @command, one that makes the image under a temporary name and
    renames it when the stream has ended.
    """

    def __init__(self, path: Path, command: Optional[str] = None):
        self.path = path
        name = shlex.quote(str(path))
        self.command = command or f'cat > {name}.part && mv {name}.part {name}'

    def uri(self, _vm: VM) -> str:
        return f'exec:{self.command}'

    def finish(self, timeout: float = 60) -> Path:
        """Wait until the command has written all that QEMU sent."""
        deadline = time.monotonic() + timeout
        while not self.path.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f'"{self.command}" has made no {self.path}')
            time.sleep(0.05)
        return self.path


class _DrainSink:
    """Reads a descriptor in a thread, at a given pace, into a file."""

    def __init__(self, path: Path, mb_per_s: Optional[float] = None):
        self.path = path
        self.received = 0
        self._rate = mb_per_s * 1e6 if mb_per_s else None
        self._flowing = threading.Event()
        self._flowing.set()
        self._over = False
        self._thread: Optional[threading.Thread] = None

    def hold(self) -> None:
        """Stop reading."""
        self._flowing.clear()

    def full_speed(self) -> None:
        """Read on, without a limit."""
        self._rate = None
        self._flowing.set()

    def finish(self, timeout: float = 60) -> Path:
        """Wait for the end of the stream."""
        if self._thread:
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise TimeoutError('the stream does not end')
        return self.path

    def abandon(self) -> None:
        """Stop reading for good, whatever state it is in."""
        self._over = True
        self._rate = None
        self._flowing.set()

    def _start(self, fd: int) -> None:
        self._thread = threading.Thread(target=self._drain, args=(fd,),
                                        daemon=True)
        self._thread.start()

    def _drain(self, fd: int) -> None:
        # Paced in small steps, so that the reader never sleeps for longer
        # than one step takes.
        due = time.monotonic()
        with open(self.path, 'wb', buffering=0) as image:
            while not self._over:
                self._flowing.wait()
                data = os.read(fd, CHUNK)
                if not data:
                    break
                image.write(data)
                self.received += len(data)
                if self._rate:
                    due = max(due, time.monotonic() - 0.01)
                    due += len(data) / self._rate
                    time.sleep(max(0, due - time.monotonic()))
        os.close(fd)


class PipeSink(_DrainSink):
    """A pipe that is drained at @mb_per_s (10^6 bytes; None: no limit)."""

    def uri(self, vm: VM) -> str:
        reader, writer = os.pipe()
        try:
            vm.qmp.send_fd(writer, 'sink')
        finally:
            os.close(writer)
        self._start(reader)
        return 'fd:sink'


class SocketSink(_DrainSink):
    """A unix socket that QEMU connects to."""

    def uri(self, _vm: VM) -> str:
        # A short path: those of unix sockets are limited to 107 bytes.
        self._folder = tempfile.TemporaryDirectory(prefix='lab')
        address = os.path.join(self._folder.name, 's')
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen(1)
        self._listener.settimeout(30)
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return f'unix:{address}'

    def _accept(self) -> None:
        with self._listener, self._folder:
            connection, _ = self._listener.accept()
        self._drain(connection.detach())
