"""The nested lab's host: a Linux with KVM inside a TCG guest.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import List

from .. import env
from ..vm import VM, boot

LINES = 12
DISK_MB = 256
BOOT_TIMEOUT = 180
# The tick never stops: QEMU's VMRUN can lose an interrupt that comes in while it
# notes a virtual one (helper_vmrun() changes interrupt_request without a lock).
# The local APIC looks again whenever its timer ticks; a CPU that waits for one
# event only would wait for ever.
CMDLINE = ('console=ttyS0 loglevel=7 panic=-1 tsc=reliable no_timer_check '
           'mitigations=off nohz=off highres=off '
           'kvm.force_emulation_prefix=1 kvm.tsc_tolerance_ppm=10000 '
           'kvm.halt_poll_ns=0 rcupdate.rcu_cpu_stall_timeout=120 '
           f'lines={LINES}')


@dataclass
class HostHardware:
    """The machine that runs a kernel with KVM.

    folder: of the sockets of lines, and of the disk, which becomes /dev/vda.
    options: more of the kernel's command line.
    vcpus: one for the host alone (see init), the others for nested guests.
    """
    kernel: Path
    initrd: Path
    folder: Path
    options: str = ''
    vcpus: int = 3
    ram_mb: int = 2560

    def arguments(self) -> List[str]:
        ports = ['-device', 'virtio-serial-pci,max_ports=31']
        for number in range(LINES):
            ports += ['-chardev', f'socket,id=line{number},server=on,wait=off,'
                      f'path={self.folder}/{number}',
                      '-device', f'virtserialport,chardev=line{number},'
                      f'name={number}']
        return ['-nodefaults', '-no-user-config', '-display', 'none',
                '-drive', f'if=virtio,format=raw,file={self.folder}/disk',
                '-M', 'q35', '-accel', 'tcg,thread=multi',
                '-cpu', 'max,+svm,+npt', '-m', str(self.ram_mb),
                '-smp', str(self.vcpus), '-kernel', str(self.kernel),
                '-initrd', str(self.initrd), '-append',
                f'{CMDLINE} {self.options}', *ports]


class Host:
    """Boots it; a context manager: leaving it ends the host.

    Commands are lines of shell; see run().
    """

    def __init__(self, kernel: Path, initrd: Path, log: Path,
                 options: str = ''):
        # A short path: those of unix sockets are limited to 107 bytes.
        self._folder = tempfile.TemporaryDirectory(prefix='lab')
        folder = Path(self._folder.name)
        hardware = HostHardware(kernel, initrd, folder, options)
        self._free_lines = list(range(LINES))
        self._commands = 0
        self._trouble = 0
        try:
            with (folder / 'disk').open('wb') as disk:
                disk.truncate(DISK_MB << 20)
            self.vm = boot(lambda: VM(env.STOCK, hardware, log), 'host ready',
                           BOOT_TIMEOUT)
        except BaseException:
            self._folder.cleanup()
            raise

    def __enter__(self) -> 'Host':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
