"""What the user and the guest may do around and during a snapshot.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import subprocess
import time

from .. import snapshot
from ..hardware import Hardware
from ..scene import Case, Scene
from ..sink import PipeSink
from ..steps import SLOW_MB_S, begin, expect_active, expect_mappings


def paused_resumes(scene: Scene) -> None:
    """A paused VM runs again by itself, long before the snapshot's end."""
    vm = scene.boot(Hardware(vcpus=2, disk=scene.new_disk()))
    sink = PipeSink(scene.image(), SLOW_MB_S)
    began = vm.qmp.mark()
    frozen = scene.pause(vm)
    vm.expect_status('paused')
    mark = snapshot.start(vm, sink)
    vm.qmp.wait_event(began, 'RESUME', lambda e: e['event'] == 'RESUME', 30)
    vm.expect_status('running')
    scene.check.moves(vm)
    expect_active(vm, 'guest runs')
    snapshot.wait(vm, mark)
    vm.expect_status('running')
    scene.prove(vm)
    scene.prove_image(sink.finish(), vm.hardware, frozen)


def running_is_stopped_and_resumed(scene: Scene) -> None:
    """Without step 1: migrate stops the VM itself."""
    vm = scene.boot()
    sink = PipeSink(scene.image(), SLOW_MB_S)
    snapshot.take(vm, sink, stop=False)
    vm.expect_status('running')
    scene.prove(vm)
    scene.prove_image(sink.finish(), vm.hardware)


def straight_after(scene: Scene) -> None:
    """The next snapshot may begin as soon as one is reported complete."""
    vm = scene.boot()
    sinks = [PipeSink(scene.image(f'image{i}')) for i in range(4)]
    for sink in sinks:
        snapshot.take(vm, sink)
    scene.prove(vm)
    for sink in sinks:
        sink.finish()
    scene.prove_image(sinks[-1].path, vm.hardware)


def stop_and_cont(scene: Scene) -> None:
    vm = scene.boot()
    sink, mark, _ = begin(scene, vm)
    for _ in range(3):
        vm.qmp.cmd('stop')
        vm.expect_status('paused')
        vm.qmp.cmd('cont')
        vm.expect_status('running')
    expect_active(vm, 'stopped and continued')
    snapshot.wait(vm, mark)
    vm.expect_status('running')
    scene.prove(vm)
    scene.prove_image(sink.finish(), vm.hardware)


def stays_stopped(scene: Scene) -> None:
    """A VM that the user stops during the snapshot stays stopped."""
    vm = scene.boot()
    sink, mark, _ = begin(scene, vm)
    vm.qmp.cmd('stop')
    expect_active(vm, 'stopped')
    snapshot.wait(vm, mark)
    vm.expect_status('paused')
    scene.prove_image(sink.finish(), vm.hardware)
    vm.qmp.cmd('cont')
    scene.prove(vm)


def guest_powers_off(scene: Scene) -> None:
    vm = scene.boot()
    sink, mark, _ = begin(scene, vm)
    vm.console.run('poweroff -f')
    vm.qmp.wait_event(mark, 'SHUTDOWN', lambda e: e['event'] == 'SHUTDOWN', 30)
    expect_active(vm, 'powered off')
    snapshot.wait(vm, mark)
    vm.expect_status('shutdown')
    scene.prove_image(sink.finish(), vm.hardware)


def reset(scene: Scene) -> None:
    vm = scene.boot()
    sink, mark, _ = begin(scene, vm)
    lines = vm.console.mark()
    vm.qmp.cmd('system_reset')
    vm.qmp.wait_event(mark, 'RESET', lambda e: e['event'] == 'RESET', 30)
    expect_active(vm, 'reset')
    snapshot.wait(vm, mark)
    vm.wait_boot(since=lines)
    scene.check.start(vm)
    scene.prove(vm)
    scene.prove_image(sink.finish(), vm.hardware)


def quit_ends(scene: Scene) -> None:
    """QEMU can be ended during a snapshot."""
    vm = scene.boot()
    begin(scene, vm)
    vm.qmp.cmd('quit')
    try:
        code = vm.process._process.wait(20)
    except subprocess.TimeoutExpired:
        raise AssertionError('QEMU still runs 20 s after quit') from None
    if code != 0:
        raise AssertionError(f'QEMU ended with code {code} after quit')


def traps_end(scene: Scene) -> None:
    """After the snapshot: as many mappings as before, and full speed."""
    vm = scene.boot()
    before, speed = vm.process.mappings(), scene.check.speed(vm)
    sink = PipeSink(scene.image())
    scene.pause(vm)
    snapshot.wait(vm, snapshot.start(vm, sink))
    scene.check.prove(vm)
    expect_mappings(vm, before)
    # Others may use this machine: what counts is one good time of five.
    tries = []
    while len(tries) < 5 and (not tries or max(tries) < 0.7 * speed):
        tries.append(scene.check.speed(vm))
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


CASES = [
    Case('paused-resumes', paused_resumes),
    Case('running-resumes', running_is_stopped_and_resumed),
    Case('straight-after', straight_after),
    Case('stop-and-cont', stop_and_cont),
    Case('stays-stopped', stays_stopped),
    Case('guest-powers-off', guest_powers_off),
    Case('reset', reset),
    Case('quit', quit_ends),
    Case('traps-end', traps_end),
    Case('iothread-stops', iothread_stops),
]
