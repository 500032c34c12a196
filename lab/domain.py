"""A domain of libvirt's whose guest checks itself.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import contextlib
import socket
from pathlib import Path
from typing import Any, Callable, List, Optional
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from . import disk
from .console import Console
from .hardware import MACHINE, Hardware
from .libvirt import Daemon, VirshError
from .scene import Scene
from .vm import boot, kernel_trouble
from .workload import DiskCheck

NAME = 'guest'
TARGETS = ('vda', 'vdb')
DISK_MB = 64
UUID = '7be3a41d-5f0c-4cf0-8a52-3d1f0f2a6c11'  # of its images, too


def _definition(hardware: Hardware, emulator: Path, disks: List[Path],
                serial: Path, kernel_log: Path) -> str:
    drives = ''.join(f'''
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none'/>
      <source file='{path}'/><target dev='{target}' bus='virtio'/>
    </disk>''' for path, target in zip(disks, TARGETS))
    return f'''
<domain type='qemu'>
  <name>{NAME}</name><uuid>{UUID}</uuid>
  <memory unit='MiB'>{hardware.ram_mb}</memory>
  <vcpu>{hardware.vcpus}</vcpu>
  <os>
    <type arch='x86_64' machine='{MACHINE}'>hvm</type>
    <kernel>{hardware.kernel}</kernel><initrd>{hardware.initrd}</initrd>
    <cmdline>{escape(hardware.cmdline)}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='maximum'/>
  <devices>
    <emulator>{emulator}</emulator>{drives}
    <serial type='file'>
      <source path='{kernel_log}' append='on'/><target port='0'/>
    </serial>
    <serial type='unix'>
      <source mode='bind' path='{serial}'/><target port='1'/>
    </serial>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <video><model type='none'/></video>
  </devices>
</domain>
'''


class Domain:
    """A domain with two disks.  For workloads and Scene.prove() it is a VM.

    disks: what it is defined with, which become vda and vdb; prefix: of their
    names, and of those of its logs; changes: as those of Scene.hardware().
    """

    def __init__(self, scene: Scene, daemon: Daemon, emulator: Path,
                 prefix: str = '', **changes: Any):
        self.daemon = daemon
        self.place = scene.place
        self.disks = [scene.files / f'{prefix}{target}.qcow2'
                      for target in TARGETS]
        self.second = DiskCheck(device='/dev/vdb')
        self.hardware = scene.hardware(vcpus=2, disk=self.disks[0], **changes)
        self._scene = scene
        self._prefix = prefix
        self._kernel_log = scene.logs / f'{prefix}kernel.log'
        self._serial = daemon.home / 'serial'
        self._connected = 0
        self._console: Optional[Console] = None
        for path in self.disks:
            disk.new(scene.place, path, DISK_MB)
        # QEMU could not make it there.
        self._kernel_log.touch()
        daemon.give(self._kernel_log, *self.disks)
        definition = scene.files / 'domain.xml'
        definition.write_text(_definition(
            self.hardware, emulator, self.disks, self._serial,
            self._kernel_log))
        daemon.virsh('define', definition)
        definition.unlink()
        scene.callback(self._disconnect)

    @property
    def console(self) -> Console:
        assert self._console
        return self._console

    def virsh(self, command: str, *arguments: object) -> str:
        """A command that takes a domain, for this one."""
        return self.daemon.virsh(command, NAME, *arguments)

    def boot(self, start: Optional[Callable[[], 'Domain']] = None) -> None:
        """Boot it and start the workloads in the guest."""
        boot(start or self.start)
        self._scene.disk_check.start(self)
        self.second.start(self)
        self._scene.check.start(self)

    def start(self) -> 'Domain':
        """Without waiting for the guest."""
        # Not to miss what the guest says first.
        self.virsh('start', '--paused')
        self.connect()
        self.virsh('resume')
        return self

    def connect(self) -> None:
        """To its console, after it was restored."""
        self._disconnect()
        self._connected += 1
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(self._serial))
        self._console = Console(
            self._socket,
            self._scene.logs / f'{self._prefix}lines{self._connected}.log')

    def _disconnect(self) -> None:
        if self._console:
            # QEMU may have ended.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._console.close()
            self._console = None

    def close(self) -> None:
        with contextlib.suppress(VirshError):
            self.virsh('destroy')
        self._disconnect()

    def state(self) -> str:
        return self.virsh('domstate')

    def prove(self) -> None:
        """The guest finds nothing wrong and goes on, with both disks."""
        self._scene.prove(self)
        self.second.prove(self)

    def assert_alive(self) -> None:
        state = self.state()
        if state != 'running':
            raise AssertionError(f'the domain is {state}')

    def kernel_trouble(self) -> List[str]:
        return kernel_trouble(self._kernel_log)

    def last_output(self) -> str:
        return self.daemon.qemu_log(NAME)

    def sources(self, *options: str) -> List[Path]:
        """The files that its disks are."""
        xml = ElementTree.fromstring(self.virsh('dumpxml', *options))
        return [Path(source.attrib['file'])
                for source in xml.findall('./devices/disk/source')]
