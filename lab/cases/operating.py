"""What operators do to a VM that saves itself, and what happens to it.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import os
import resource
import signal
import subprocess
import time
from functools import partial

from .. import disk, snapshot
from ..format import FORMATS, STREAM
from ..hardware import Hardware
from ..host import MIB, mount_tmpfs
from ..scene import Case, Scene
from ..sink import ExecSink, FileSink, SocketSink
from ..steps import (SLOW_MB_S, begin, begin_held, expect_end, finish,
                     reboot_guest, refused, still_clean, wait_until)
from ..vm import VM

SNAPSHOTS = 50
# The heaps of QEMU's threads, which are not always the same ones.
HEAP_MB = 8
# Threads of QEMU's pools end when there was nothing to do for 10 s.
SETTLE_S = 12
# More than RLIMIT_AS will leave, less than the VM's RAM; room for threads.
RAM_MB, BUFFER_MB, SPARE_MB = 512, 448, 192
# An hour's snapshots of one that is taken each 10 seconds, and then some.
SOAK_S, SOAK_PAUSE_S = 30 * 60, 10
# Its tables, as far as they are cached.
OVERLAY_MB = 0.1


def _residue(vm: VM) -> dict:
    """What snapshots could leave behind."""
    # As many serve the disk as it happens to need.
    threads = [t for t in vm.process.threads() if t != 'worker']
    return {'threads': len(threads), 'files': vm.process.files(),
            'mappings': vm.process.mappings(),
            'MB': vm.process.heap() / MIB}


def _expect_no_residue(vm: VM, before: dict) -> None:
    allowed = {'threads': 0, 'files': 0, 'mappings': 20, 'MB': HEAP_MB}

    def grown() -> dict:
        return {what: (before[what], now)
                for what, now in _residue(vm).items()
                if now > before[what] + allowed[what]}
    deadline = time.monotonic() + 2 * SETTLE_S
    left = grown()
    while left and time.monotonic() < deadline:
        time.sleep(0.5)
        left = grown()
    if left:
        raise AssertionError(f'before and after: {left}; '
                             f'threads: {vm.process.threads()}')


def repeated(scene: Scene, trap: str) -> None:
    """One straight after the other, of two formats, leave nothing behind."""
    vm = scene.boot()
    scene.choose_trap(vm, trap)
    formats = [STREAM, FORMATS['parallel']]
    before = {}
    for number in range(SNAPSHOTS + len(formats)):
        if number == len(formats):
            time.sleep(SETTLE_S)
            before = _residue(vm)
        scene.format = formats[number % len(formats)]
        snapshot.enable(vm, scene.format)
        snapshot.wait(vm, snapshot.start(
            vm, FileSink(scene.image(), scene.format)))
    _expect_no_residue(vm, before)
    scene.prove(vm)
    vm.qmp.cmd('stop')
    scene.prove_image(scene.image(), vm.hardware)


def destinations(scene: Scene) -> None:
    """A command that is killed, a socket that is closed."""
    vm = scene.boot()
    begun = begin_held(scene, vm)
    [command] = vm.process.children()
    os.kill(command, signal.SIGKILL)
    expect_end(vm, begun.mark, 'failed', 30)
    still_clean(scene, vm)

    sink = SocketSink(scene.image(), SLOW_MB_S)
    mark = begin(scene, vm, sink).mark
    sink.abandon()
    expect_end(vm, mark, 'failed', 30)
    still_clean(scene, vm)
    scene.round_trip(vm, ExecSink(scene.image('second')))


def read_only(scene: Scene) -> None:
    room = scene.files / 'tmpfs'
    mount_tmpfs(scene, room, 'size=1m')
    subprocess.run(['mount', '-o', 'remount,ro', room], check=True)
    vm = scene.boot()
    snapshot.enable(vm)
    refused('a read-only place', 'Read-only', lambda: vm.qmp.cmd(
        'migrate', uri=f'file:{room}/image'))
    still_clean(scene, vm)
    scene.round_trip(vm)


def user_acts(scene: Scene) -> None:
    """The user stops, continues, powers down and resets the VM meanwhile."""
    vm = scene.boot()
    begun = begin_held(scene, vm)
    vm.qmp.cmd('stop')
    vm.expect_status('paused')
    time.sleep(0.5)
    vm.qmp.cmd('cont')
    still_clean(scene, vm)
    # This guest does not listen to its power button.
    vm.qmp.cmd('system_powerdown')
    still_clean(scene, vm)
    reboot_guest(scene, vm, lambda: vm.qmp.cmd('system_reset'))
    finish(scene, vm, begun)
    vm.qmp.cmd('cont')
    scene.round_trip(vm)


def stays_stopped(scene: Scene) -> None:
    """A VM that the user stops meanwhile is not resumed by the end."""
    vm = scene.boot()
    begun = begin_held(scene, vm)
    vm.qmp.cmd('stop')
    begun.sink.full_speed()
    snapshot.wait(vm, begun.mark)
    vm.expect_status('paused')
    scene.prove_image(begun.sink.finish(), vm.hardware)
    vm.qmp.cmd('cont')
    scene.round_trip(vm)


def quits(scene: Scene) -> None:
    """QEMU ends when it is told to, though nobody takes the image."""
    vm = scene.boot()
    begin_held(scene, vm)
    vm.qmp.cmd('quit')
    wait_until('QEMU has ended', vm.process.ended, 10)
    if vm.process.ended() != 'ended with code 0':
        vm.assert_alive()


def killed(scene: Scene) -> None:
    """The disk and the image before survive when QEMU is killed."""
    vm = scene.boot(Hardware(vcpus=2, disk=scene.new_disk()))
    frozen = scene.pause(vm)
    image = scene.image('first')
    snapshot.wait(vm, snapshot.start(vm, FileSink(image)))
    scene.prove(vm)
    begun = begin_held(scene, vm)
    os.kill(vm.process.pid, signal.SIGKILL)
    vm.close()
    assert frozen and begun.frozen
    overlays = list(scene.files.glob('overlay*.qcow2'))
    assert len(overlays) == 2 and begun.frozen in overlays
    for one in (frozen, *overlays):
        disk.check(scene.place, one)
    scene.prove_image(image, vm.hardware, frozen)


def no_memory(scene: Scene) -> None:
    """The buffer cannot be allocated."""
    vm = scene.boot(scene.hardware(ram_mb=RAM_MB))
    vm.qmp.cmd('migrate-set-parameters', snapshot_buffer_size=BUFFER_MB * MIB)
    snapshot.enable(vm)
    limits = resource.prlimit(vm.process.pid, resource.RLIMIT_AS)
    resource.prlimit(vm.process.pid, resource.RLIMIT_AS, (
        vm.process.memory('status', 'VmSize') + SPARE_MB * MIB, limits[1]))
    reason = expect_end(vm, snapshot.start(vm, FileSink(scene.image())),
                        'failed', 30)
    if 'page buffer' not in reason:
        raise AssertionError(f'unclear reason: {reason}')
    still_clean(scene, vm)
    resource.prlimit(vm.process.pid, resource.RLIMIT_AS, limits)
    scene.round_trip(vm)


def soak(scene: Scene) -> None:
    """One each few seconds, each restored, of a guest that has a disk."""
    vm = scene.boot(Hardware(vcpus=2, disk=scene.new_disk()),
                    '-name', 'debug-threads=on')
    # Each leaves an overlay, which QEMU has open.
    looks = []
    for _ in range(3):
        scene.round_trip(vm)
        time.sleep(SETTLE_S)
        looks.append(_residue(vm))
    before = looks[-1]
    per_overlay = before['files'] - looks[-2]['files']
    end, number = time.monotonic() + SOAK_S, 0
    while time.monotonic() < end:
        next_one = time.monotonic() + SOAK_PAUSE_S
        scene.round_trip(vm)
        number += 1
        time.sleep(max(0, next_one - time.monotonic()))
    before['files'] += per_overlay * number
    before['MB'] += OVERLAY_MB * number
    _expect_no_residue(vm, before)
    scene.note(f'{number} snapshots, each restored')


CASES = [
    *(Case(f'operating-repeated-{trap}', partial(repeated, trap=trap))
      for trap in ('uffd-signal', 'uffd-thread')),
    Case('operating-destinations', destinations),
    Case('operating-read-only', read_only),
    Case('operating-user-acts', user_acts),
    Case('operating-stays-stopped', stays_stopped),
    Case('operating-quits', quits),
    Case('operating-killed', killed),
    Case('operating-no-memory', no_memory),
    Case('operating-soak', soak, extra=True),
]
