"""What the user and the guest may do around and during a snapshot.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import os
import time
from functools import partial
from pathlib import Path

from .. import snapshot
from ..hardware import Hardware
from ..scene import Case, Scene
from ..sink import FileSink, PipeSink
from ..slow_disk import SlowDisk
from ..steps import SLOW_MB_S, begin_held, expect_active, expect_mappings
from ..vm import VM


def running_is_stopped_and_resumed(scene: Scene) -> None:
    """Without step 1: migrate stops the VM itself."""
    vm = scene.boot()
    sink = PipeSink(scene.image(), SLOW_MB_S)
    snapshot.take(vm, sink)
    vm.expect_status('running')
    scene.prove(vm)
    scene.prove_image(sink.finish(), vm.hardware)


def guest_powers_off(scene: Scene) -> None:
    vm = scene.boot()
    sink, mark, _ = begin_held(scene, vm)
    vm.console.run('poweroff -f')
    vm.qmp.wait_event(mark, 'SHUTDOWN', lambda e: e['event'] == 'SHUTDOWN', 30)
    expect_active(vm, 'powered off')
    sink.full_speed()
    snapshot.wait(vm, mark)
    vm.expect_status('shutdown')
    scene.prove_image(sink.finish(), vm.hardware)


def _speed(scene: Scene, vm: VM) -> float:
    """Pages that the guest writes in a second of QEMU's CPU time.

    Others may use this machine.
    """
    def cpu() -> float:
        stat = Path(f'/proc/{vm.process.pid}/stat').read_text()
        return sum(map(int, stat.rpartition(')')[2].split()[11:13])
                   ) / os.sysconf('SC_CLK_TCK')
    began, used = time.monotonic(), cpu()
    speed = scene.check.speed(vm)
    return speed * (time.monotonic() - began) / (cpu() - used)


def traps_end(scene: Scene) -> None:
    """After the snapshot: as many mappings as before, and full speed."""
    vm = scene.boot()
    before, speed = vm.process.mappings(), _speed(scene, vm)
    sink = PipeSink(scene.image())
    scene.pause(vm)
    snapshot.wait(vm, snapshot.start(vm, sink))
    scene.check.prove(vm)
    expect_mappings(vm, before)
    # What counts is one good time of five.
    tries = []
    while len(tries) < 5 and (not tries or max(tries) < 0.7 * speed):
        tries.append(_speed(scene, vm))
    if max(tries) < 0.7 * speed:
        raise AssertionError(f'{speed:.0f} pages/s before the snapshot, '
                             f'at best {max(tries):.0f} after it')


def iothread_stops(scene: Scene) -> None:
    """No request gets lost that ends while the VM is being stopped.

    In unmodified QEMU, each stop loses one in 50.
    """
    vm = scene.boot(Hardware(vcpus=2, disk=scene.new_disk(), iothread=True))
    for _ in range(200):
        vm.qmp.cmd('stop')
        vm.qmp.cmd('cont')
        time.sleep(0.05)
    scene.prove(vm)


def reads_in_flight(trap: str, scene: Scene) -> None:
    """Memory is armed while the VM runs and its disk is being read into it."""
    with SlowDisk(0.1) as disk:
        vm = scene.boot(scene.hardware(), *disk.arguments())
        scene.choose_trap(vm, trap)
        for _ in range(3):
            vm.console.run('while dd if=/dev/vda of=/dev/null bs=256k '
                           'iflag=direct 2>/dev/null; do :; done &')
        time.sleep(1)
        for _ in range(5):
            snapshot.take(vm, FileSink(scene.image()))
        scene.prove(vm)


CASES = [
    Case('running-resumes', running_is_stopped_and_resumed),
    Case('guest-powers-off', guest_powers_off),
    Case('traps-end', traps_end),
    Case('iothread-stops', iothread_stops),
    *(Case(f'reads-in-flight-{trap}', partial(reads_in_flight, trap))
      for trap in snapshot.TRAPS),
]
