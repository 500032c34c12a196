"""What cases do in common: steps of a snapshot, and what they expect.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import re
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Type

from . import snapshot
from .qmp import ExecuteError
from .scene import Scene
from .sink import GateSink, PipeSink
from .vm import VM

SLOW_MB_S = 80
# So much has a sink got once the RAM is on its way.
UNDER_WAY = 8e6


class Begun(NamedTuple):
    """A snapshot: its sink, the mark for snapshot.wait(), the frozen disk."""
    sink: Any
    mark: int
    frozen: Optional[Path]


def wait_until(what: str, condition: Callable[[], Any],
               timeout: float = 30, every: float = 0.05) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f'not within {timeout:.0f} s: {what}')
        time.sleep(every)


def begin(scene: Scene, vm: VM, sink: Any = None) -> Begun:
    """Pause @vm and start a snapshot that resumes it and is under way.

    The sink is by default so slow that something can be done meanwhile.
    """
    sink = sink or PipeSink(scene.image(), SLOW_MB_S)
    frozen = scene.pause(vm)
    mark = snapshot.start(vm, sink)
    wait_until('the VM runs and RAM is being saved', lambda:
               (not isinstance(sink, PipeSink) or sink.received >= UNDER_WAY)
               and vm.status() == 'running', 30 * vm.place.patience)
    return Begun(sink, mark, frozen)


def begin_held(scene: Scene, vm: VM, buffer_mb: int = 0) -> Begun:
    """As begin(), and nothing goes to the sink before its full_speed().

    The buffer has room for all of the RAM, or for @buffer_mb.
    """
    vm.qmp.cmd('migrate-set-parameters',
               snapshot_buffer_size=(buffer_mb or vm.hardware.ram_mb) << 20)
    return begin(scene, vm, GateSink(scene.place, scene.image()))


def reboot_guest(scene: Scene, vm: VM, how: Callable[[], Any]) -> None:
    """@how has the guest boot anew, during a snapshot."""
    lines = vm.console.mark()
    how()
    vm.wait_boot(lines)
    expect_active(vm, 'rebooted')
    scene.check.start(vm)


def finish(scene: Scene, vm: VM, begun: Begun) -> None:
    """The snapshot completes; original and restored guest are clean."""
    begun.sink.full_speed()
    snapshot.wait(vm, begun.mark)
    scene.prove(vm)
    vm.qmp.cmd('stop')
    scene.prove_image(begun.sink.finish(), vm.hardware, begun.frozen)


def expect(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise AssertionError(f'{what}: {found}, expected {expected}')


def expect_active(vm: VM, when: str) -> None:
    status = vm.qmp.cmd('query-migrate')['status']
    if status != 'active':
        raise AssertionError(f'{when}: snapshot is {status} already: '
                             'the case has tested nothing')


def expect_end(vm: VM, mark: int, status: str, timeout: float) -> str:
    """The snapshot ends as @status within @timeout; returns the reason."""
    try:
        snapshot.wait(vm, mark, timeout)
    except snapshot.SnapshotFailed as failure:
        if not str(failure).startswith(status):
            raise AssertionError(f'snapshot ended as {failure}, '
                                 f'expected {status}') from failure
        return str(failure)
    raise AssertionError(f'snapshot completed, expected {status}')


def expect_not_whole(scene: Scene, vm: VM, image: Path) -> None:
    """The unmodified QEMU does not take @image for one."""
    vm.qmp.cmd('stop')
    try:
        snapshot.restore(image, vm.hardware, scene.logs / 'not-whole',
                         scene.place, scene.format).close()
    except snapshot.SnapshotFailed:
        vm.qmp.cmd('cont')
        return
    raise AssertionError('an image that is not whole was restored')


def expect_trap(vm: VM, trap: str) -> None:
    """The latest snapshot has used it."""
    used = snapshot.figures(vm)['write-trap']
    if used != trap:
        raise AssertionError(f'used {used}, expected {trap}')


def expect_mappings(vm: VM, before: int) -> None:
    after = vm.process.mappings()
    # A few more or less: stacks and arenas of threads come and go.
    if abs(after - before) > 20:
        raise AssertionError(f'{before} mappings before, {after} after')


def refused(what: str, pattern: str, request: Callable[[], Any],
            error: Type[Exception] = ExecuteError) -> None:
    """@request raises @error, by default QMP's; @pattern is found in it."""
    try:
        request()
    except error as refusal:
        if not re.search(pattern, str(refusal), re.I):
            raise AssertionError(f'{what}: refused with "{refusal}", which '
                                 f'does not say "{pattern}"') from refusal
        return
    raise AssertionError(f'{what}: accepted')


def still_clean(scene: Scene, vm: VM) -> None:
    vm.expect_status('running')
    scene.check.moves(vm)
