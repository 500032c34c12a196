"""Destinations for a snapshot.

Each sink gives a URI for `migrate`, and finish() returns the image's path once
everything has arrived.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import os
import shlex
import socket
import tempfile
import time
from pathlib import Path
from typing import Any, Optional

from .drain import Drain
from .format import STREAM, Format
from .place import Place
from .vm import VM


class FileSink:
    """QEMU writes the file itself."""

    def __init__(self, path: Path, image_format: Format = STREAM):
        self.path = path
        self._format = image_format

    def uri(self, _vm: VM) -> str:
        return self._format.uri(str(self.path))

    def finish(self, _timeout: float = 60) -> Path:
        return self.path


class ExecSink:
    """A shell command's standard input.

    It makes the image under a temporary name and renames it when the stream
    has ended.
    """

    def __init__(self, path: Path):
        self.path = path

    def uri(self, _vm: VM) -> str:
        name = shlex.quote(str(self.path))
        return f'exec:cat > {name}.part && mv {name}.part {name}'

    def finish(self, timeout: float = 60) -> Path:
        """Wait until the command has written all that QEMU sent."""
        deadline = time.monotonic() + timeout
        while not self.path.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f'the command has made no {self.path}')
            time.sleep(0.05)
        return self.path


class GateSink:
    """A file at a place, which takes nothing before full_speed() is called.

    What the snapshot has to save until then stays in its buffer.
    """

    def __init__(self, place: Place, path: Path):
        self.path = path
        self._place = place
        self._gate = shlex.quote(f'{path}.open')

    def uri(self, _vm: VM) -> str:
        # If QEMU is killed, this ends, and what it has inherited is free.
        return (f'exec:until [ -e {self._gate} ]; do sleep 0.1; '
                'kill -0 $PPID || exit; done; '
                f'cat >{shlex.quote(str(self.path))}')

    def full_speed(self) -> None:
        self._place.run(f'touch {self._gate}')

    def finish(self, _timeout: float = 60) -> Path:
        self._place.run(f'rm {self._gate}')
        return self.path


class PipeSink:
    """A pipe of which a program takes @mb_per_s (10^6 bytes; None: no limit).

    It takes what it may take in @burst_ms as fast as it comes, then nothing
    until those milliseconds are over; see drain.c.
    """

    def __init__(self, path: Path, mb_per_s: Optional[float] = None,
                 burst_ms: int = 20):
        self.path = path
        self._burst = int((mb_per_s or 0) * 1e3 * burst_ms)
        self._burst_ms = burst_ms
        self._drain: Optional[Drain] = None

    @property
    def received(self) -> int:
        """How many bytes have come so far."""
        return self._drain.control.received if self._drain else 0

    @property
    def pid(self) -> int:
        """Of the program that takes them."""
        assert self._drain
        return self._drain.pid

    @property
    def cpu_s(self) -> float:
        """Seconds of CPU time that it took; once the stream has ended."""
        return self._drain.control.cpu_ns / 1e9 if self._drain else 0

    def uri(self, vm: VM) -> str:
        reader, writer = os.pipe()
        try:
            self._start(reader)
            vm.qmp.send_fd(writer, 'sink')
        finally:
            os.close(reader)
            os.close(writer)
        return 'fd:sink'

    def hold(self) -> None:
        """Stop reading."""
        self._drain.control.held = True

    def full_speed(self) -> None:
        """Read on, without a limit."""
        self._drain.control.burst = 0
        self._drain.control.held = False

    def finish(self, timeout: float = 60) -> Path:
        """Wait for the end of the stream."""
        if self._drain:
            self._drain.finish(timeout)
        return self.path

    def abandon(self) -> None:
        """Stop reading for good, whatever state it is in."""
        if self._drain:
            self._drain.kill()

    def _start(self, source: Any) -> None:
        self._drain = Drain(source, self.path, self._burst, self._burst_ms)


class SocketSink(PipeSink):
    """A unix socket that QEMU connects to."""

    def uri(self, _vm: VM) -> str:
        # A short path: those of unix sockets are limited to 107 bytes.
        self._folder = tempfile.TemporaryDirectory(prefix='lab')
        address = os.path.join(self._folder.name, 's')
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(1)
            self._start(listener)
        return f'unix:{address}'

    def finish(self, timeout: float = 60) -> Path:
        self._folder.cleanup()
        return super().finish(timeout)
