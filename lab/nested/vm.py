"""Virtual machines that run with KVM inside the nested lab's host.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import shlex
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional

from ..console import Console
from ..qmp import Qmp
from ..vm import VM, Hardware
from .host import Host
from .initramfs import INITRD, KERNEL


@dataclass
class NestedHardware(Hardware):
    """The same machine as the lab's other guests have, on KVM.

    cpu: without the virtualization that the host has, by default.
    ram_file: a file in the host that is to be the guest's RAM.
    guest: a file in the host, what the VM starts.
    """
    vcpus: int = 2
    ram_mb: int = 256
    cpu: str = 'max,svm=off'
    ram_file: Optional[Path] = None
    guest: Path = KERNEL

    def arguments(self) -> List[str]:
        arguments = super().arguments()
        for option, value in (('-accel', 'kvm'), ('-cpu', self.cpu),
                              ('-kernel', str(self.guest)),
                              ('-initrd', str(INITRD))):
            arguments[arguments.index(option) + 1] = value
        if self.ram_file:
            arguments[arguments.index('-M') + 1] += ',memory-backend=file'
            arguments += ['-object', 'memory-backend-file,id=file,share=on,'
                          f'size={self.ram_mb}M,mem-path={self.ram_file}']
        # The host has no constant TSC, so that the guest's sched_clock,
        # which the watchdog goes by, jumps.  Its kvmclock does not.
        arguments[arguments.index('-append') + 1] += ' nosoftlockup'
        return arguments


class NestedVM(VM):
    """A QEMU in the host.  Its log files are on this side.

    program: OURS or STOCK; log: the common beginning of the files' names.
    """

    def __init__(self, host: Host, program: Path, hardware: Hardware,
                 log: Path, *more: str):
        # pylint: disable=super-init-not-called
        self.binary = program
        self.hardware = hardware
        self._host = host
        self._kernel_log = log.with_name(log.name + '.kernel.log')
        self.output = log.with_name(log.name + '.qemu.log')
        self._lines = [host.open_line() for _ in range(4)]
        kernel, output, lab, monitor = self._lines
        self._logs = [Console(kernel.socket, self._kernel_log),
                      Console(output.socket, self.output)]
        self.console = Console(lab.socket,
                               log.with_name(log.name + '.lines.log'))
        command = shlex.join([
            str(program), *hardware.arguments(),
            '-chardev', f'pipe,id=qmp,path={monitor.path}',
            '-mon', 'chardev=qmp,mode=control',
            '-chardev', f'pipe,id=kernel,path={kernel.path}',
            '-serial', 'chardev:kernel',
            '-chardev', f'pipe,id=lab,path={lab.path}',
            '-serial', 'chardev:lab', '-no-shutdown', *more])
        [pid] = host.run(f'{command} >{output.path} 2>&1 & echo $!')
        self._pid = int(pid)
        try:
            self.qmp = Qmp(monitor.socket, timeout=120)
        except BaseException as problem:
            self._end()
            raise RuntimeError(f'{program.name} did not start: '
                               + self.last_output()) from problem

    def mappings(self) -> int:
        [count] = self._host.run(f'wc -l </proc/{self._pid}/maps')
        return int(count)

    def assert_alive(self) -> None:
        try:
            self._host.run(f'kill -0 {self._pid}')
        except RuntimeError as problem:
            raise RuntimeError(f'{self.binary.name} has ended: '
                               + self.last_output()) from problem

    def _end(self) -> None:
        self._host.run(f'kill -9 {self._pid} || true; '
                       f'while kill -0 {self._pid}; do sleep 0.1; done '
                       '2>/dev/null || true')
        for line in self._lines[:3]:
            line.socket.shutdown(socket.SHUT_RDWR)
        for console in (*self._logs, self.console):
            console.close()
        for line in self._lines:
            self._host.close_line(line)
