"""The guest's serial console as lines.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import array
import fcntl
import re
import socket
import termios
import threading
import time
from pathlib import Path
from typing import List


class GuestError(Exception):
    """The guest said that something is wrong, or did not say what it should"""


class Console:
    """Reads all lines of the guest as they come, and keeps and logs them."""

    def __init__(self, sock: socket.socket, log: Path):
        self._sock = sock
        self._log = log.open('wb', buffering=0)
        self._lines: List[str] = []
        self._times: List[float] = []
        self._more = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def run(self, command: str) -> None:
        """Have the guest's shell execute one line."""
        self._sock.sendall(command.encode() + b'\n')

    def mark(self) -> int:
        """A position in the stream of lines, for wait() and lines()."""
        with self._more:
            return len(self._lines)

    def lines(self, since: int = 0) -> List[str]:
        with self._more:
            return self._lines[since:]

    def times(self, since: int = 0) -> List[float]:
        """When each of lines() came, by time.monotonic()."""
        with self._more:
            return self._times[since:]

    def wait(self, pattern: str, since: int, timeout: float) -> 're.Match':
        """The first line after the mark @since that @pattern is found in.

        Raises GuestError if the guest reports BAD, stops talking or says no
        such line within @timeout seconds.
        """
        deadline = time.monotonic() + timeout
        at = since
        with self._more:
            while True:
                # Also one that came before, which may be said but once.
                for line in self._lines:
                    if 'BAD' in line:
                        raise GuestError(line)
                for line in self._lines[at:]:
                    found = re.search(pattern, line)
                    if found:
                        return found
                at = len(self._lines)
                left = deadline - time.monotonic()
                if left <= 0 or self._closed:
                    last = self._lines[-1] if self._lines else 'nothing'
                    why = 'ended' if self._closed else 'said no'
                    raise GuestError(f'guest {why}: "{pattern}" in '
                                     f'{timeout:.0f} s; last line: {last}')
                self._more.wait(left)

    def check(self, since: int = 0) -> None:
        """Raise GuestError if a line since the mark reports BAD."""
        for line in self.lines(since):
            if 'BAD' in line:
                raise GuestError(line)

    def settle(self) -> None:
        """Of a stopped guest: wait until all that it has said is read."""
        unread = array.array('i', [1])
        while unread[0]:
            fcntl.ioctl(self._sock, termios.FIONREAD, unread)
            time.sleep(0.01)

    def close(self) -> None:
        """Wait for the end of the stream; QEMU must have ended before."""
        self._thread.join(10)
        self._sock.close()
        self._log.close()

    def _read(self) -> None:
        rest = b''
        while True:
            try:
                data = self._sock.recv(65536)
            except OSError:
                data = b''
            if data:
                self._log.write(data)
            *whole, rest = (rest + data).split(b'\n')
            with self._more:
                self._lines += [w.decode(errors='replace').rstrip('\r')
                                for w in whole]
                self._times += [time.monotonic()] * len(whole)
                self._closed = not data
                self._more.notify_all()
            if not data:
                return
