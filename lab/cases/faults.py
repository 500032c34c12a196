"""System calls of QEMU's that fail, one after the other.

Each in turn of the first ones that a snapshot makes: it may fail then, with a
reason, or do without; but if it completes, its image is good, and the guest
and the next snapshot are not concerned.  strace has them fail: it finds the
calls of libraries as well, and the code has no second way for tests only.  A
thread that cannot be created is not among them: any QEMU aborts then.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import re
import shutil
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from .. import snapshot
from ..format import FORMATS, STREAM, Format
from ..host import Skip
from ..qmp import ExecuteError
from ..scene import Case, Scene
from ..sink import FileSink
from ..steps import still_clean
from ..vm import VM

ATTACH_S = 10


class Fault(NamedTuple):
    """A system call, the error that it returns, and how many are tried."""
    call: str
    error: str
    tries: int


# What userfaultfd is told, and what is asked of the page tables.
IOCTL = Fault('ioctl', 'ENOMEM', 10)
# The trap's device, the page tables, the image, its channels.
OPEN = Fault('openat', 'EMFILE', 6)
# Huge pages, and memory that is allocated ahead.
MADVISE = Fault('madvise', 'EAGAIN', 3)


class Failing:
    """While it is entered, the n-th @fault.call of each thread fails."""

    def __init__(self, vm: VM, fault: Fault, number: int, log: Path):
        self._vm = vm
        self._log = log
        self._command = [
            'strace', '-f', '-o', str(log), '-e', f'trace={fault.call}', '-e',
            f'inject={fault.call}:error={fault.error}:when={number}',
            '-p', str(vm.process.pid)]

    def __enter__(self) -> 'Failing':
        self._strace = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + ATTACH_S
        while not self._attached():
            if self._strace.poll() is not None:
                raise Skip('strace: ' + self._strace.stderr.read().strip())
            if time.monotonic() > deadline:
                raise RuntimeError('strace does not attach')
            time.sleep(0.02)
        return self

    def _attached(self) -> bool:
        tasks = (Path('/proc') / str(self._vm.process.pid) / 'task').iterdir()
        try:
            return all(re.search(r'^TracerPid:\s+[1-9]',
                                 (task / 'status').read_text(), re.M)
                       for task in tasks)
        except OSError:
            return False  # A thread has ended

    def __exit__(self, *_: object) -> None:
        self._strace.terminate()
        self._strace.communicate()

    def hit(self) -> bool:
        """Whether there was such a call.  To be asked afterwards."""
        return '(INJECTED)' in self._log.read_text()


def _take(vm: VM, sink: FileSink, image_format: Format) -> str:
    """A snapshot; returns why it has failed, '' if it has not."""
    try:
        snapshot.enable(vm, image_format)
        snapshot.wait(vm, snapshot.start(vm, sink))
    except (ExecuteError, snapshot.SnapshotFailed) as failure:
        return str(failure)
    return ''


def faults(trap: str, image_format: Format, calls: tuple, scene: Scene
           ) -> None:
    if not shutil.which('strace'):
        raise Skip('strace is not installed')
    scene.format = image_format
    vm = scene.boot(scene.hardware(ram_mb=256))
    scene.choose_trap(vm, trap)
    hits = failures = 0
    for fault in calls:
        for number in range(1, fault.tries + 1):
            sink = FileSink(scene.image(), image_format)
            failing = Failing(vm, fault, number,
                              scene.logs / f'{fault.call}{number}')
            with failing:
                failure = _take(vm, sink, image_format)
            vm.assert_alive()
            vm.expect_status('running')
            still_clean(scene, vm)
            if not failing.hit():
                break
            hits += 1
            if failure:
                failures += 1
                if 'no reason given' in failure:
                    raise AssertionError(f'{fault.call} {number}: {failure}')
            else:
                vm.qmp.cmd('stop')
                scene.prove_image(sink.finish(), vm.hardware)
                vm.qmp.cmd('cont')
    scene.note(f'{hits} calls failed, and {failures} snapshots')
    if not failures or failures == hits:
        raise AssertionError(f'{failures} of {hits} snapshots failed: '
                             'the case has tested nothing')
    scene.round_trip(vm)


CASES = [
    Case(f'faults-{name}', partial(faults, trap, image_format, calls))
    for name, trap, image_format, calls in (
        ('uffd-signal', 'uffd-signal', STREAM,
         (IOCTL, OPEN, MADVISE, Fault('writev', 'EIO', 2))),
        ('mprotect', 'mprotect', FORMATS['mapped'],
         (OPEN, Fault('mprotect', 'ENOMEM', 8), Fault('mmap', 'ENOMEM', 4),
          Fault('pwritev', 'EIO', 2))),
        ('uffd-thread', 'uffd-thread', FORMATS['parallel'],
         (IOCTL, OPEN, Fault('pwritev', 'EIO', 2),
          Fault('ftruncate', 'EIO', 1))))
]
