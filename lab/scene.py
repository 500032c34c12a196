"""What a test case works with: VMs that end with it, logs, scratch files.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import contextlib
import os
import shlex
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, List, NamedTuple, Optional, Sequence

from . import disk, env, host, snapshot
from .format import STREAM
from .hardware import Hardware
from .memory import KINDS
from .place import HERE, Place
from .sink import FileSink
from .vm import VM, boot
from .workload import DiskCheck, SelfCheck


class Case(NamedTuple):
    """A test; run() raises if it fails, and Skip if it cannot run here.

    hosts: those of nested/host.py that it is for; none: this machine.
    extra: only run if it is asked for; libvirt: of those that need it.
    """
    name: str
    run: Callable[['Scene'], None]
    hosts: Sequence[str] = ()
    extra: bool = False
    libvirt: bool = False


class Scene(contextlib.ExitStack):
    """One case's VMs and files.  Leaving it ends and removes them.

    check, disk_check: the workloads in its guests.
    format: that of its images.
    """

    def __init__(self, name: str, place: Place = HERE):
        super().__init__()
        self.place = place
        self.logs = env.LOGS / 'lab' / name
        self.files = place.scratch / name
        self.check = SelfCheck()
        self.disk_check = DiskCheck()
        self.format = STREAM
        self.notes: List[str] = []
        self._overlays = 0
        self._restored = 0
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir(parents=True)
        files = shlex.quote(str(self.files))
        place.run(f'rm -rf {files}; mkdir -p {files}')
        self.callback(place.run, f'rm -rf {files} || true')

    def note(self, text: str) -> None:
        """Have something shown with the outcome of a case that passes."""
        self.notes.append(text)

    def hardware(self, **changes: Any) -> Hardware:
        """That of the place, but for @changes."""
        return replace(self.place.hardware, **changes)

    def start(self, hardware: Hardware, *more: str) -> VM:
        """Start the patched QEMU; does not wait for the guest."""
        return self.enter_context(self._vm(hardware, *more))

    def boot(self, hardware: Optional[Hardware] = None, *more: str,
             launcher: Sequence[str] = ()) -> VM:
        """Boot the patched QEMU and start the workloads in the guest."""
        hardware = hardware or self.hardware()
        vm = self.enter_context(boot(
            lambda: self._vm(hardware, *more, launcher=launcher)))
        while KINDS[hardware.memory].half_plugged and not self._plugged(vm):
            time.sleep(0.1)
        if hardware.disk:
            self.disk_check.start(vm)
        self.check.start(vm)
        return vm

    def _vm(self, hardware: Hardware, *more: str,
            launcher: Sequence[str] = ()) -> VM:
        return VM(self.place.qemu, hardware, self.logs / 'source',
                  '-trace', 'background_snapshot_*', *more, place=self.place,
                  launcher=launcher)

    @staticmethod
    def _plugged(vm: VM) -> bool:
        """Has the guest got what its virtio-mem device is to have?"""
        size, requested = (vm.qmp.cmd('qom-get', path='vmem', property=name)
                           for name in ('size', 'requested-size'))
        return size == requested

    def choose_trap(self, vm: VM, trap: str) -> None:
        """Have the snapshots of @vm use a write trap.

        Raises Skip with QEMU's reason if this host has no such trap for the
        VM's memory.  QEMU has to know that, and what is there.
        """
        reason = snapshot.traps(vm)[trap]
        there = KINDS[vm.hardware.memory].has(trap)
        if there and reason:
            raise AssertionError(f'{trap} can be, but is out: {reason}')
        if not there and not reason:
            raise AssertionError(f'{trap} is available, but cannot be')
        if reason:
            raise host.Skip(f'{trap}: {reason}')
        snapshot.set_trap(vm, trap)

    def new_disk(self) -> Path:
        """A disk for boot() which gives the guest a checked disk."""
        return disk.new(self.place, self.files / 'disk.qcow2',
                        self.disk_check.disk_mb)

    def image(self, name: str = 'image') -> Path:
        return self.files / name

    def pause(self, vm: VM) -> Optional[Path]:
        """Steps 1 to 3; returns the frozen disk if there is a disk."""
        snapshot.pause(vm)
        frozen = None
        if vm.hardware.disk:
            self._overlays += 1
            frozen = snapshot.snapshot_disk(
                vm, self.files / f'overlay{self._overlays}.qcow2')
        snapshot.enable(vm, self.format)
        return frozen

    def prove(self, vm: VM) -> None:
        """The guest finds nothing wrong and goes on, and QEMU lives."""
        vm.assert_alive()
        vm.console.check()
        self.check.prove(vm)
        if vm.hardware.disk:
            self.disk_check.prove(vm)
        trouble = vm.kernel_trouble()
        if trouble:
            raise AssertionError(f'guest kernel: {trouble[0]}')

    def prove_image(self, image: Path, hardware: Hardware,
                    frozen: Optional[Path] = None) -> None:
        """The unmodified QEMU restores it, and the guest runs on clean."""
        self._restored += 1
        if frozen:
            hardware = replace(hardware, disk=disk.new_overlay(
                self.place, frozen, self.files / 'restored.qcow2'))
        with snapshot.restore(image, hardware,
                              self.logs / f'restored{self._restored}',
                              self.place, self.format) as restored:
            self.prove(restored)
        self.place.run(f'rm {shlex.quote(str(image))}')

    def round_trip(self, vm: VM, sink=None) -> None:
        """The whole workflow; then original and restored guest are clean."""
        sink = sink or FileSink(self.image(), self.format)
        frozen = self.pause(vm)
        snapshot.wait(vm, snapshot.start(vm, sink))
        image = sink.finish()
        vm.expect_status('running')
        self.prove(vm)
        # Both guests at once would only make each other slow.
        vm.qmp.cmd('stop')
        self.prove_image(image, vm.hardware, frozen)
        vm.qmp.cmd('cont')


def rounds() -> int:
    """Snapshots of each VM in the main round-trip cases: ROUNDS."""
    return int(os.environ.get('ROUNDS') or 1)


def acceptance() -> bool:
    """Whether time does not matter."""
    return rounds() >= 20
