"""A test case's nested VMs, their logs here and their files in the host.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import time
from dataclasses import replace
from pathlib import Path
from typing import Optional

from .. import snapshot
from ..scene import Scene
from ..workload import DiskCheck, SelfCheck
from .host import Host
from .initramfs import OURS, QEMU_IMG, STOCK
from .vm import NestedHardware, NestedVM

# Nested, all takes some ten times as long as elsewhere.
BOOT_TIMEOUT = 180
SNAPSHOT_TIMEOUT = 180


class NestedScene(Scene):
    """One case in @host; leaving it ends its VMs and removes its files."""

    def __init__(self, host: Host, name: str):
        super().__init__(f'kvm/{name}')
        self.host = host
        self.files = Path('/tmp/lab')
        host.run(f'mkdir {self.files}')
        self.callback(host.run, f'rm -rf {self.files}')
        self.check = SelfCheck(write_mb=24, static_mb=8, pause_us=5000)
        self.disk_check = DiskCheck(disk_mb=8, ring_mb=1)

    def start(self, hardware: NestedHardware, *more: str) -> NestedVM:
        """The patched QEMU; does not wait for the guest."""
        return self.enter_context(NestedVM(
            self.host, OURS, hardware, self.logs / 'source',
            '-trace', 'background_snapshot_*', *more))

    def boot(self, hardware: Optional[NestedHardware] = None, *more: str,
             launcher=()) -> NestedVM:
        """With a disk, and the workloads running in the guest."""
        vm = self.start(hardware or NestedHardware(disk=self.new_disk()),
                        *more)
        vm.wait_boot(BOOT_TIMEOUT)
        if vm.hardware.disk:
            self.disk_check.start(vm)
        self.check.start(vm)
        return vm

    def new_disk(self) -> Path:
        disk = self.files / 'disk.qcow2'
        self.host.run(f'{QEMU_IMG} create -q -f qcow2 {disk} '
                      f'{self.disk_check.disk_mb}M')
        return disk

    def prove_image(self, image: Path, hardware: NestedHardware,
                    frozen: Optional[Path] = None) -> None:
        """The unmodified QEMU restores it, and the guest runs on clean."""
        self._restored += 1
        if frozen:
            disk = self.files / 'restored.qcow2'
            self.host.run(f'{QEMU_IMG} create -q -f qcow2 -b {frozen} '
                          f'-F qcow2 {disk}')
            hardware = replace(hardware, disk=disk)
        with NestedVM(self.host, STOCK, hardware,
                      self.logs / f'restored{self._restored}',
                      '-incoming', 'defer') as restored:
            snapshot.load(restored, image, SNAPSHOT_TIMEOUT)
            self.prove(restored)
        self.host.run(f'rm {image}')


class GateSink:
    """A file in the host, which takes nothing before open() is called.

    What the snapshot has to save until then stays in its buffer.
    """

    def __init__(self, host: Host, path: Path):
        self.path = path
        self._host = host
        self._gate = f'{path}.open'

    def uri(self, _vm: NestedVM) -> str:
        return (f'exec:until [ -e {self._gate} ]; do sleep 0.1; done; '
                f'cat >{self.path}')

    def open(self) -> None:
        self._host.run(f'touch {self._gate}')

    def finish(self, _timeout: float = 60) -> Path:
        return self.path


def begin(scene: NestedScene, vm: NestedVM,
          buffer_mb: int = 0) -> 'tuple[GateSink, int, Path]':
    """Pause @vm and start a snapshot that lets it run on and is held there.

    It has room for all of the RAM, or for @buffer_mb.
    Returns its sink, the mark for snapshot.wait() and the frozen disk.
    """
    sink = GateSink(scene.host, scene.image())
    vm.qmp.cmd('migrate-set-parameters',
               snapshot_buffer_size=(buffer_mb or vm.hardware.ram_mb) << 20)
    frozen = scene.pause(vm)
    mark = snapshot.start(vm, sink)
    deadline = time.monotonic() + SNAPSHOT_TIMEOUT
    while vm.status() != 'running':
        if time.monotonic() > deadline:
            raise AssertionError(f'VM is {vm.status()}')
        time.sleep(0.1)
    return sink, mark, frozen
