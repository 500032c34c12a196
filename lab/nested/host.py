"""The nested lab's host: a Linux with KVM inside a TCG guest.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import shlex
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from .. import env, place
from ..console import Console
from ..hardware import Hardware
from ..vm import VM, boot
from . import debug, initramfs
from .kernel import DEBIAN

LINES = 12
DISK_MB = 256
BOOT_S = 180
# The tick never stops: QEMU's VMRUN can lose an interrupt that comes in while
# it notes a virtual one (helper_vmrun() changes interrupt_request without a
# lock).  The local APIC looks again whenever its timer ticks; a CPU that waits
# for one event only would wait for ever.
CMDLINE = ('console=ttyS0 loglevel=7 panic=-1 tsc=reliable no_timer_check '
           'mitigations=off nohz=off highres=off '
           'kvm.force_emulation_prefix=1 kvm.tsc_tolerance_ppm=10000 '
           'kvm.halt_poll_ns=0 rcupdate.rcu_cpu_stall_timeout=120 '
           f'lines={LINES}')
# Of the guests in it.  The host has no constant TSC, so that the guest's
# sched_clock, which the watchdog goes by, jumps.  Its kvmclock does not.
GUEST = Hardware(vcpus=2, ram_mb=256, accel='kvm', cpu='max,svm=off',
                 kernel=initramfs.KERNEL, initrd=initramfs.INITRD,
                 cmdline=Hardware.cmdline + ' nosoftlockup')
# The kernel, the initramfs and more of the kernel's command line.
HOSTS: Dict[str, Tuple[Path, Path, str]] = {
    'patched': (DEBIAN.image, initramfs.PATCHED, ''),
    # KVM shadows the page tables of its guests.
    'shadow': (DEBIAN.image, initramfs.PATCHED, 'kvm_amd.npt=0'),
    'debug': (debug.VMLINUX, initramfs.DEBUG, ''),
    'control': (DEBIAN.image, initramfs.CONTROL, ''),
}


class Host:
    """A place (see place.py): one of HOSTS, booted.

    It has one vCPU for itself (see init), the others for nested guests.
    initrd: in place of its own.
    """
    qemu = initramfs.OURS
    stock = initramfs.STOCK
    qemu_img = initramfs.QEMU_IMG
    scratch = Path('/tmp/lab')
    hardware = GUEST
    patience = 3

    def __init__(self, name: str, log: Path,
                 initrd: Optional[Path] = None):
        # A short path: those of unix sockets are limited to 107 bytes.
        self._folder = tempfile.TemporaryDirectory(prefix='lab')
        folder = Path(self._folder.name)
        self._free_lines = list(range(LINES))
        self._commands = 0
        self._trouble = 0
        kernel, usual, options = HOSTS[name]
        hardware = Hardware(vcpus=3, ram_mb=2560, cpu='max,+svm,+npt',
                            kernel=kernel, initrd=initrd or usual,
                            cmdline=f'{CMDLINE} {options}')
        more = ['-drive', f'if=virtio,format=raw,file={folder}/disk',
                '-device', 'virtio-serial-pci,max_ports=31']
        for line in range(LINES):
            more += ['-chardev', f'socket,id=line{line},server=on,wait=off,'
                     f'path={folder}/{line}', '-device',
                     f'virtserialport,chardev=line{line},name={line}']
        try:
            with (folder / 'disk').open('wb') as disk:
                disk.truncate(DISK_MB << 20)
            self.vm = boot(lambda: VM(env.STOCK, hardware, log, *more),
                           'host ready', BOOT_S)
        except BaseException:
            self._folder.cleanup()
            raise

    def run(self, command: str, timeout: float = 60) -> List[str]:
        """What a shell command prints; raises RuntimeError if it fails."""
        self._commands += 1
        mark = self.vm.console.mark()
        end = f'done {self._commands}'
        self.vm.console.run(f'({command}); echo "{end} $?"')
        found = self.vm.console.wait(f'^{end} ([0-9]+)$', mark, timeout)
        printed = self.vm.console.lines(mark)
        printed = printed[:printed.index(found.group(0))]
        if found.group(1) != '0':
            raise RuntimeError(f'in the host: {command}: status '
                               f'{found.group(1)}: {" | ".join(printed)}')
        return printed

    def start(self, command: List[str], log: Path) -> 'NestedProcess':
        return NestedProcess(self, command, log)

    def open_line(self) -> 'Line':
        """A connection to a file in the host, which a program may open."""
        number = self._free_lines.pop(0)
        far = socket.socket(socket.AF_UNIX)
        far.connect(f'{self._folder.name}/{number}')
        return Line(number, far, f'/dev/lines/{number}')

    def close_line(self, line: 'Line') -> None:
        """To be used again; the program in the host must have ended."""
        line.socket.close()
        self._free_lines.append(line.number)

    def trouble(self) -> List[str]:
        """New lines of its kernel's log that should not be there."""
        found = self.vm.kernel_trouble()
        new, self._trouble = found[self._trouble:], len(found)
        return new

    def close(self) -> None:
        self.vm.close()
        self._folder.cleanup()


@dataclass
class Line:
    """One end here, the other a character device in the host."""
    number: int
    socket: socket.socket
    path: str


class NestedProcess:
    """A QEMU in the host; see place.Process."""

    def __init__(self, host: Host, command: List[str], log: Path):
        self._host = host
        self.kernel_log = place.log_file(log, 'kernel')
        self.output = place.log_file(log, 'qemu')
        self._lines = [host.open_line() for _ in range(4)]
        kernel, console, output, monitor = self._lines
        self.console = Console(console.socket, place.log_file(log, 'lines'))
        self._consoles = [self.console,
                          Console(kernel.socket, self.kernel_log),
                          Console(output.socket, self.output)]
        self.monitor = monitor.socket
        options = place.lines(*(f'pipe,path={line.path}' for line
                                in (kernel, console, monitor)))
        [pid] = host.run(f'{shlex.join([*command, *options])} '
                         f'>{output.path} 2>&1 & echo $!')
        self._pid = int(pid)

    def ended(self) -> str:
        try:
            self._host.run(f'kill -0 {self._pid}')
        except RuntimeError:
            return 'has ended'
        return ''

    def end(self) -> None:
        self._host.run(f'kill -9 {self._pid} || true; '
                       f'while kill -0 {self._pid}; do sleep 0.1; done '
                       '2>/dev/null || true')
        for line in self._lines[:3]:
            line.socket.shutdown(socket.SHUT_RDWR)
        for console in self._consoles:
            console.close()
        for line in self._lines:
            self._host.close_line(line)
