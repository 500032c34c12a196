"""Starts and ends virtual machines.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import ctypes
import os
import re
import signal
import socket
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, List, Optional, Sequence, Tuple

from . import guest, kernel
from .console import Console
from .memory import KINDS
from .qmp import Qmp

MACHINE = 'pc-q35-10.0'
# Without init_on_alloc, what the balloon takes is not written before.
CMDLINE = ('console=ttyS0 quiet loglevel=4 panic=-1 tsc=reliable '
           'no_timer_check mitigations=off cryptomgr.notests init_on_alloc=0 '
           'rcupdate.rcu_cpu_stall_timeout=120 memhp_default_state=online')
TROUBLE = ('BUG:', 'WARNING:', 'Oops', 'Kernel panic', 'I/O error',
           'EXT4-fs error', 'lab: ')
TCG_BUG = '(iotlb_to_section|msix_table_mmio_write): Assertion'


@dataclass
class Hardware:
    """What a VM has; a restored one must have the same.

    memory: one of memory.KINDS.
    disk: a qcow2 image, which becomes the guest's /dev/vda; read and written
        by @aio, in a thread of its own if @iothread.
    devices: a -device each.
    """
    vcpus: int = 1
    ram_mb: int = 320
    memory: str = 'plain'
    disk: Optional[Path] = None
    aio: str = 'threads'
    iothread: bool = False
    devices: Tuple[str, ...] = ()

    def arguments(self) -> List[str]:
        machine, more = KINDS[self.memory].arguments(self.ram_mb)
        if self.disk:
            more += ['-blockdev', 'driver=qcow2,node-name=disk,'
                     'file.driver=file,cache.direct=on,'
                     f'file.cache.direct=on,file.aio={self.aio},'
                     f'file.filename={self.disk}']
            device = 'virtio-blk-pci,id=vda,drive=disk'
            if self.iothread:
                more += ['-object', 'iothread,id=disk-thread']
                device += ',iothread=disk-thread'
            more += ['-device', device]
        for device in self.devices:
            more += ['-device', device]
        return ['-nodefaults', '-no-user-config', '-display', 'none',
                '-M', f'{MACHINE},usb=off{machine}',
                '-accel', 'tcg,thread=multi', '-cpu', 'max',
                '-smp', str(self.vcpus),
                '-kernel', str(kernel.GUEST.image),
                '-initrd', str(guest.INITRD),
                '-append', CMDLINE, *more]


class VM:
    """A running QEMU.  Use as a context manager: leaving it ends QEMU.

    binary: which QEMU; log: the common beginning of its log files' names;
    launcher: a command that executes QEMU, such as those of confined.py.
    """

    def __init__(self, binary: Path, hardware: Hardware, log: Path,
                 *more: str, launcher: Sequence[str] = ()):
        self.binary = binary
        self.hardware = hardware
        self._kernel_log = log.with_name(log.name + '.kernel.log')
        self._kernel_log.unlink(missing_ok=True)
        # Not by QEMU itself, which may run as somebody else.
        self._kernel_log.touch()
        self._kernel_log.chmod(0o666)
        self.output = log.with_name(log.name + '.qemu.log')
        monitor, monitor_far = socket.socketpair()
        serial, serial_far = socket.socketpair()
        with monitor_far, serial_far, self.output.open('wb') as output:
            self.process = subprocess.Popen(
                [*launcher, str(binary), *hardware.arguments(),
                 '-chardev', f'socket,id=qmp,fd={monitor_far.fileno()}',
                 '-mon', 'chardev=qmp,mode=control',
                 '-serial', f'file:{self._kernel_log}',
                 '-chardev', f'socket,id=lab,fd={serial_far.fileno()}',
                 '-serial', 'chardev:lab', '-no-shutdown', *more],
                pass_fds=(monitor_far.fileno(), serial_far.fileno()),
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True, preexec_fn=_die_with_parent)
        self.console = Console(serial, log.with_name(log.name + '.lines.log'))
        try:
            self.qmp = Qmp(monitor)
        except BaseException as problem:
            self._end()
            raise RuntimeError(f'{binary.name} did not start: '
                               + self.last_output()) from problem

    def __enter__(self) -> 'VM':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_boot(self, timeout: float = 60, since: int = 0) -> None:
        self.console.wait('guest ready', since, timeout)

    def status(self) -> str:
        """QEMU's run state."""
        return self.qmp.cmd('query-status')['status']

    def kernel_trouble(self) -> List[str]:
        """Lines of the guest's kernel log that should not be there."""
        text = self._kernel_log.read_text(errors='replace')
        return [line for line in text.splitlines()
                if any(word in line for word in TROUBLE)]

    def mappings(self) -> int:
        """How many mappings the kernel keeps for the process."""
        maps = Path(f'/proc/{self.process.pid}/maps')
        return len(maps.read_text().splitlines())

    def memory_used(self) -> int:
        """Bytes of the host's memory, and of its files, that QEMU occupies.

        Counted are anonymous memory and the files without a name that QEMU
        has open: those of memfds and of backends whose mem-path is a folder.
        """
        process = Path(f'/proc/{self.process.pid}')
        [anonymous] = re.findall(r'^RssAnon:\s+(\d+) kB',
                                 (process / 'status').read_text(), re.M)
        blocks = 0
        for fd in (process / 'fd').iterdir():
            try:
                file = fd.stat()
            except FileNotFoundError:
                continue  # closed by now
            if stat.S_ISREG(file.st_mode) and file.st_nlink == 0:
                blocks += file.st_blocks
        return int(anonymous) * 1024 + blocks * 512

    def rollup(self, line: str) -> int:
        """Bytes that a line of the process's smaps_rollup tells."""
        text = Path(f'/proc/{self.process.pid}/smaps_rollup').read_text()
        [kb] = re.findall(rf'^{line}:\s+(\d+) kB', text, re.M)
        return int(kb) * 1024

    def traced(self, event: str) -> List[str]:
        """What `-trace event` has written so far, without the event's name."""
        return re.findall(rf'\b{event} (.*)',
                          self.output.read_text(errors='replace'))

    def assert_alive(self) -> None:
        """Raise RuntimeError with QEMU's last words if it has ended."""
        code = self.process.poll()
        if code is not None:
            raise RuntimeError(f'{self.binary.name} ended with code {code}: '
                               + self.last_output())

    def close(self) -> None:
        self.qmp.close()
        self._end()

    def _end(self) -> None:
        # The whole group: exec: destinations are children of QEMU.
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self.console.close()

    def last_output(self) -> str:
        """QEMU's last words."""
        text = self.output.read_text(errors='replace').strip()
        return ' | '.join(text.splitlines()[-5:]) or 'it said nothing'


def boot(start: Callable[[], VM], ready: str = 'guest ready',
         timeout: float = 60) -> VM:
    """A VM whose guest says that it is @ready.

    QEMU 10.0's TCG uses a wrong entry of its map of devices, about once in 100
    boots with several CPUs, modified or not: then the VM is started again.
    """
    for tries_left in (2, 1, 0):
        vm = start()
        try:
            vm.console.wait(ready, 0, timeout)
            break
        except BaseException:
            vm.close()
            if not tries_left or not re.search(TCG_BUG, vm.last_output()):
                raise
    return vm


def _die_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
