"""Images in which each page has its place: mapped-ram, also in parallel.

Each write trap with each of these formats, in the unmodified QEMU; where the
image may be; and how they end that do not become whole.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import os
import signal
from pathlib import Path

from .. import snapshot
from ..format import FORMATS, Format
from ..hardware import Hardware
from ..host import needs_direct_io
from ..scene import Case, Scene, rounds
from ..sink import FileSink
from ..snapshot import TRAPS
from ..steps import (Begun, begin, expect_end, expect_not_whole, expect_trap,
                     refused, still_clean, wait_until)
from ..vm import VM
from .failing import CANCEL_S, disk_full

# So slow that something can be done meanwhile.
SLOW = 20_000_000
OFFSET = 0x12345


def _begin_slow(scene: Scene, vm: VM) -> Begun:
    """A snapshot that is under way, and takes long."""
    vm.qmp.cmd('migrate-set-parameters', max_bandwidth=SLOW)
    sink = FileSink(scene.image(), scene.format)
    begun = begin(scene, vm, sink)
    wait_until('there is RAM in the file',
               lambda: sink.path.stat().st_blocks * 512 > SLOW // 4)
    return begun


def _full_speed(vm: VM) -> None:
    vm.qmp.cmd('migrate-set-parameters', max_bandwidth=0)


def _each_format(scene: Scene, trap: str) -> None:
    needs_direct_io(scene.files)
    vm = scene.boot(Hardware(vcpus=2, disk=scene.new_disk()))
    scene.choose_trap(vm, trap)
    for number in range(rounds()):
        for name, scene.format in FORMATS.items():
            image = scene.image(f'{name}{number}')
            scene.round_trip(vm, FileSink(image, scene.format))
            expect_trap(vm, trap)


def _holes(scene: Scene) -> None:
    """What the guest has not touched takes no room in the file."""
    scene.format = FORMATS['parallel']
    vm = scene.boot(scene.hardware(ram_mb=4096))
    scene.pause(vm)
    sink = FileSink(scene.image(), scene.format)
    info = snapshot.wait(vm, snapshot.start(vm, sink))
    size = sink.path.stat()
    data = info['ram']['normal-bytes']
    if size.st_size < 4096 << 20 or data > 1024 << 20:
        raise AssertionError(f'not what this is about: {size}, {data}')
    if not data <= size.st_blocks * 512 < data + (64 << 20):
        raise AssertionError(f'{data} bytes of RAM take {size.st_blocks * 512}'
                             ' in the file')
    vm.qmp.cmd('stop')
    scene.prove_image(sink.finish(), vm.hardware)


class FdSink(FileSink):
    """A file that QEMU gets opened, with @flags."""

    def __init__(self, path: Path, image_format: Format, *flags: int):
        super().__init__(path, image_format)
        self._flags = flags

    def uri(self, vm: VM) -> str:
        [number] = {vm.qmp.add_fd(os.open(self.path, flags, 0o600))
                    for flags in self._flags}
        return self._format.uri(f'/dev/fdset/{number}')


def _places(scene: Scene) -> None:
    """An offset, file descriptors, a file that held something else."""
    needs_direct_io(scene.files)
    vm = scene.boot()
    image = scene.image()
    mapped, direct = FORMATS['mapped'], FORMATS['direct']
    for sink, scene.format in (
            (FileSink, FORMATS['parallel']._replace(offset=OFFSET)),
            (FileSink, direct._replace(offset=OFFSET)),
            (lambda *a: FdSink(*a, os.O_WRONLY), mapped),
            (lambda *a: FdSink(*a, os.O_WRONLY, os.O_WRONLY | os.O_DIRECT),
             direct)):
        image.write_bytes(b'old' * (8 << 20))
        scene.round_trip(vm, sink(image, scene.format))


def _refusals(scene: Scene) -> None:
    needs_direct_io(scene.files)
    vm = scene.boot()
    refused('multifd alone', 'needs mapped-ram', lambda: snapshot.enable(
        vm, Format(channels=2)))
    Format().choose(vm)
    snapshot.enable(vm, FORMATS['parallel'])
    for uri, pattern in ((f'exec:cat >{scene.image()}', 'seekable'),
                         ('file:/nonexistent/folder/image', 'No such file')):
        refused(uri, pattern, lambda u=uri: vm.qmp.cmd('migrate', uri=u))
        still_clean(scene, vm)
    # There is none with O_DIRECT: known before the VM stands still.
    snapshot.enable(vm, FORMATS['direct'])
    scene.image().touch()
    mark = snapshot.start(vm, FdSink(scene.image(), FORMATS['direct'],
                                     os.O_WRONLY))
    expect_end(vm, mark, 'failed', 30)
    if any(e['event'] == 'STOP' for e in vm.qmp.events[mark:]):
        raise AssertionError('the VM was stopped for nothing')
    still_clean(scene, vm)
    scene.format = FORMATS['parallel']
    scene.round_trip(vm)


def _choose(scene: Scene, name: str) -> None:
    scene.format = FORMATS[name]
    if scene.format.direct:
        needs_direct_io(scene.files)


def _disk_full(scene: Scene, name: str) -> None:
    scene.format = FORMATS[name]
    disk_full(scene)


def _cancel(scene: Scene, name: str) -> None:
    _choose(scene, name)
    vm = scene.boot()
    begun = _begin_slow(scene, vm)
    vm.qmp.cmd('migrate_cancel')
    expect_end(vm, begun.mark, 'cancelled', CANCEL_S)
    vm.expect_status('running')
    scene.prove(vm)
    expect_not_whole(scene, vm, begun.sink.path)
    _full_speed(vm)
    scene.round_trip(vm, FileSink(scene.image('second'), scene.format))


def _killed(scene: Scene, name: str) -> None:
    """QEMU ends while it saves: the image does not look whole."""
    _choose(scene, name)
    vm = scene.boot()
    begun = _begin_slow(scene, vm)
    os.kill(vm.process.pid, signal.SIGKILL)
    vm.close()
    other = scene.boot()
    expect_not_whole(scene, other, begun.sink.path)


CASES = [
    *(Case(f'formats-{trap}', lambda scene, t=trap: _each_format(scene, t))
      for trap in TRAPS),
    Case('formats-holes', _holes),
    Case('formats-places', _places),
    Case('formats-refusals', _refusals),
    *(Case(f'formats-{what}-{name}', lambda scene, f=run, n=name: f(scene, n))
      for name in FORMATS
      for what, run in (('disk-full', _disk_full), ('cancel', _cancel),
                        ('killed', _killed))),
]
