"""A program that takes a stream, see drain.c, and its controls.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import ctypes
import mmap
import os
import subprocess
from pathlib import Path
from typing import Any

from . import env
from .host import DIE_WITH_US

SOURCE = Path(__file__).with_name('drain.c')
PROGRAM = env.LAB / 'drain'


def build() -> None:
    """Compile the program if it is missing or older than its source."""
    if (PROGRAM.exists()
            and PROGRAM.stat().st_mtime >= SOURCE.stat().st_mtime):
        return
    PROGRAM.parent.mkdir(parents=True, exist_ok=True)
    part = PROGRAM.with_name(f'drain.{os.getpid()}.part')
    subprocess.run(['gcc', '-std=gnu11', '-O2', '-Wall', '-Wextra', '-Werror',
                    '-o', part, SOURCE], check=True)
    part.rename(PROGRAM)


class Control(ctypes.Structure):
    """As in drain.c"""
    _fields_ = [('received', ctypes.c_uint64), ('burst', ctypes.c_uint64),
                ('held', ctypes.c_uint64), ('cpu_ns', ctypes.c_uint64)]


class Drain:
    """Takes what comes from @source, a descriptor or file, into @path.

    burst: how many bytes it takes in each @step_ms; 0: no limit.
    control: its fields may be read and changed while it runs.
    """

    def __init__(self, source: Any, path: Path, burst: int, step_ms: int):
        build()
        fd = os.memfd_create('drain')
        try:
            os.ftruncate(fd, mmap.PAGESIZE)
            self.control = Control.from_buffer(mmap.mmap(fd, mmap.PAGESIZE))
            self.control.burst = burst
            with path.open('wb') as image:
                self._process = subprocess.Popen(
                    [*DIE_WITH_US, PROGRAM, str(fd), str(step_ms)],
                    stdin=source, stdout=image, pass_fds=(fd,))
        finally:
            os.close(fd)
        self.pid = self._process.pid

    def finish(self, timeout: float) -> None:
        """Wait for the end of the stream."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError('the stream does not end') from None
        if self._process.returncode:
            raise RuntimeError(f'drain: exit code {self._process.returncode}')

    def kill(self) -> None:
        """Take no more, whatever state it is in."""
        self._process.kill()
        self._process.wait()
