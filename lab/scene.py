"""What a test case works with: VMs that end with it, logs, scratch files.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Callable, List, NamedTuple, Optional, Sequence

from . import env, host, snapshot
from .memory import KINDS
from .sink import FileSink
from .vm import VM, Hardware, boot
from .workload import DiskCheck, SelfCheck


class Case(NamedTuple):
    """A test; run() raises if it fails, and Skip if it cannot run here."""
    name: str
    run: Callable[['Scene'], None]


class Scene(contextlib.ExitStack):
    """One case's VMs and files.  Leaving it ends and removes them."""

    def __init__(self, name: str):
        super().__init__()
        self.logs = env.LOGS / 'lab' / name
        self.files = env.LAB / 'scratch' / name
        self.check = SelfCheck()
        self.disk_check = DiskCheck()
        self.notes: List[str] = []
        self._overlays = 0
        self._restored = 0
        for folder in (self.logs, self.files):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self.callback(shutil.rmtree, self.files, ignore_errors=True)

    def note(self, text: str) -> None:
        """Have something shown with the outcome of a case that passes."""
        self.notes.append(text)

    def boot(self, hardware: Optional[Hardware] = None, *more: str,
             launcher: Sequence[str] = ()) -> VM:
        """Boot the patched QEMU and start the workloads in the guest."""
        hardware = hardware or Hardware()
        vm = self.enter_context(boot(lambda: VM(
            env.QEMU, hardware, self.logs / 'source',
            '-trace', 'background_snapshot_*', *more, launcher=launcher)))
        while KINDS[hardware.memory].half_plugged and not self._plugged(vm):
            time.sleep(0.1)
        if hardware.disk:
            self.disk_check.start(vm)
        self.check.start(vm)
        return vm

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
        disk = self.files / 'disk.qcow2'
        subprocess.run([env.qemu_img(env.QEMU), 'create', '-q', '-f', 'qcow2',
                        disk, f'{self.disk_check.disk_mb}M'], check=True)
        return disk

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
        snapshot.enable(vm)
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
        log = self.logs / f'restored{self._restored}'
        if frozen:
            disk = snapshot.new_overlay(frozen,
                                        self.files / 'restored.qcow2')
            hardware = Hardware(**{**vars(hardware), 'disk': disk})
        with snapshot.restore(image, hardware, log) as restored:
            self.prove(restored)
        image.unlink()

    def round_trip(self, vm: VM, sink=None, timeout: float = 120) -> None:
        """The whole workflow; then original and restored guest are clean."""
        sink = sink or FileSink(self.image())
        frozen = self.pause(vm)
        snapshot.wait(vm, snapshot.start(vm, sink), timeout)
        image = sink.finish()
        expect_status(vm, 'running')
        self.prove(vm)
        # Both guests at once would only make each other slow.
        vm.qmp.cmd('stop')
        self.prove_image(image, vm.hardware, frozen)
        vm.qmp.cmd('cont')


def expect_status(vm: VM, *statuses: str) -> None:
    """QEMU's run state is one of @statuses."""
    status = vm.status()
    if status not in statuses:
        raise AssertionError(f'VM is {status}, expected '
                             + ' or '.join(statuses))


def rounds() -> int:
    """Snapshots of each VM in the main round-trip cases: ROUNDS."""
    return int(os.environ.get('ROUNDS') or 1)


def acceptance() -> bool:
    """Whether time does not matter."""
    return rounds() >= 20


