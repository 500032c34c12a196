"""What is refused, fails or is cancelled: the guest must go on.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import subprocess
import time

from .. import snapshot
from ..hardware import Hardware
from ..host import mount_tmpfs, needs_direct_io
from ..scene import Case, Scene
from ..sink import FileSink, PipeSink
from ..steps import (begin, expect_active, expect_end, expect_not_whole,
                     refused, still_clean)

# A second, and what busy hosts take.
CANCEL_S = 5


def refusals(scene: Scene) -> None:
    """They say why; afterwards a snapshot works."""
    vm = scene.boot()
    refused('postcopy-ram', 'background-snapshot|postcopy-ram',
            lambda: vm.qmp.cmd('migrate-set-capabilities', capabilities=[
                {'capability': name, 'state': True}
                for name in ('background-snapshot', 'postcopy-ram')]))
    snapshot.enable(vm)
    for uri, pattern in (('nosuch:thing', 'nosuch|protocol|uri'),
                         ('file:/nonexistent/folder/image', 'No such file'),
                         ('fd:nobody', 'nobody')):
        refused(uri, pattern, lambda u=uri: vm.qmp.cmd('migrate', uri=u))
        still_clean(scene, vm)
    # Connecting happens in the background: the error comes as a status.
    mark = vm.qmp.mark()
    vm.qmp.cmd('migrate', uri='unix:/nonexistent/socket')
    reason = expect_end(vm, mark, 'failed', 30)
    if 'No such file' not in reason:
        raise AssertionError(f'unclear reason: {reason}')
    still_clean(scene, vm)
    scene.round_trip(vm)


def disk_full(scene: Scene) -> None:
    """A file system fills up; when there is room, a retry works."""
    room = scene.files / 'tmpfs'
    mount_tmpfs(scene, room, 'size=64m')
    if scene.format.direct:
        needs_direct_io(room)
    vm = scene.boot()
    scene.pause(vm)
    image = room / 'image'
    mark = snapshot.start(vm, FileSink(image, scene.format))
    reason = expect_end(vm, mark, 'failed', 60)
    if 'No space left' not in reason:
        raise AssertionError(f'the reason does not name the cause: {reason}')
    vm.expect_status('running')
    scene.prove(vm)
    expect_not_whole(scene, vm, image)
    image.unlink()
    subprocess.run(['mount', '-o', 'remount,size=1g', room], check=True)
    scene.round_trip(vm, FileSink(image, scene.format))


def cancel(scene: Scene) -> None:
    vm = scene.boot(Hardware(vcpus=2, disk=scene.new_disk()))
    mark = begin(scene, vm).mark
    vm.qmp.cmd('migrate_cancel')
    expect_end(vm, mark, 'cancelled', CANCEL_S)
    vm.expect_status('running')
    scene.prove(vm)
    scene.round_trip(vm)


def cancel_stuck(scene: Scene) -> None:
    """Cancel while the destination reads nothing any more.

    The buffer is small and the guest writes at full speed, so that writers
    are waiting for room in it when the cancel comes.
    """
    sink = PipeSink(scene.image(), mb_per_s=40)
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


CASES = [
    Case('refusals', refusals),
    Case('disk-full', disk_full),
    Case('cancel', cancel),
    Case('cancel-stuck', cancel_stuck),
]
