"""Destinations that fail or stop, and cancelling: the guest must go on.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import subprocess
import time

from .. import snapshot
from ..hardware import Hardware
from ..host import mount_tmpfs
from ..scene import Case, Scene
from ..sink import ExecSink, FileSink, PipeSink, SocketSink
from ..steps import begin, expect_active, expect_end

CANCEL_S = 15


def command_ends(scene: Scene) -> None:
    """The command at the other end exits in the middle of the stream."""
    vm = scene.boot(Hardware(vcpus=2, disk=scene.new_disk()))
    scene.pause(vm)
    mark = snapshot.start(vm, ExecSink(scene.image(),
                                       'head -c 1000000 >/dev/null'))
    expect_end(vm, mark, 'failed', 60)
    vm.expect_status('running')
    scene.prove(vm)
    scene.round_trip(vm)


def disk_full(scene: Scene) -> None:
    """A file system fills up; when there is room, a retry works."""
    room = scene.files / 'tmpfs'
    mount_tmpfs(scene, room, 'size=64m')
    vm = scene.boot()
    scene.pause(vm)
    mark = snapshot.start(vm, FileSink(room / 'image'))
    reason = expect_end(vm, mark, 'failed', 60)
    if 'No space left' not in reason:
        raise AssertionError(f'the reason does not name the cause: {reason}')
    vm.expect_status('running')
    scene.prove(vm)
    (room / 'image').unlink()
    subprocess.run(['mount', '-o', 'remount,size=1g', room], check=True)
    scene.round_trip(vm, FileSink(room / 'image'))


def cancel(scene: Scene) -> None:
    vm = scene.boot(Hardware(vcpus=2, disk=scene.new_disk()))
    mark = begin(scene, vm).mark
    vm.qmp.cmd('migrate_cancel')
    expect_end(vm, mark, 'cancelled', CANCEL_S)
    vm.expect_status('running')
    scene.prove(vm)
    scene.round_trip(vm)


def _cancel_stuck(scene: Scene, sink) -> None:
    """Cancel while the destination reads nothing any more.

    The buffer is small and the guest writes at full speed, so that writers
    are waiting for room in it when the cancel comes.
    """
    scene.callback(sink.abandon)
    vm = scene.boot()
    vm.qmp.cmd('migrate-set-parameters', snapshot_buffer_size=1 << 20)
    mark = begin(scene, vm, sink).mark
    sink.hold()
    received = -1
    while received != sink.received:
        received = sink.received
        time.sleep(1)
    expect_active(vm, 'sink stopped')
    vm.qmp.cmd('migrate_cancel')
    expect_end(vm, mark, 'cancelled', CANCEL_S)
    vm.expect_status('running')
    scene.prove(vm)
    scene.round_trip(vm, FileSink(scene.image('second')))


def cancel_stuck_pipe(scene: Scene) -> None:
    _cancel_stuck(scene, PipeSink(scene.image(), mb_per_s=40))


def cancel_stuck_socket(scene: Scene) -> None:
    _cancel_stuck(scene, SocketSink(scene.image(), mb_per_s=40))


CASES = [
    Case('command-ends', command_ends),
    Case('disk-full', disk_full),
    Case('cancel', cancel),
    Case('cancel-stuck-pipe', cancel_stuck_pipe),
    Case('cancel-stuck-socket', cancel_stuck_socket),
]
