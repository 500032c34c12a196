"""Do the guest's checks see what they are for?  Damaged images must not pass.

Each damage is one that a faulty snapshot would do: a page, a counter or the
disk of another moment.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import re
import struct
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Tuple

from .. import snapshot
from ..console import GuestError
from ..hardware import Hardware
from ..scene import Case, Scene
from ..sink import FileSink
from ..vm import VM
from ..workload import SelfCheck

PAGE, STEP, STATIC_OWNER = 4096, 0x9e3779b97f4a7c15, 0x80
MASK = (1 << 64) - 1
SOME_PAGE = 4321
ROUNDS_TO_TRY = 12


def page_contents(owner: int, page: int, round_: int) -> bytes:
    """The same as page_seed() and page_fill() in guest/lab.h."""
    x = (owner << 56 ^ page << 24 ^ round_) & MASK
    x = (x ^ x >> 31) * 0xbf58476d1ce4e5b9 & MASK
    x = (x ^ x >> 27) * 0x94d049bb133111eb & MASK
    x ^= x >> 31
    return struct.pack('<512Q', *((x + i * STEP) & MASK
                                  for i in range(PAGE // 8)))


def other_round(change: int, data: bytearray, near: int) -> None:
    """Put another round's contents into a page of the first thread."""
    for round_ in range(max(near - 2, 0), near + ROUNDS_TO_TRY):
        at = data.find(page_contents(0, SOME_PAGE, round_))
        if at >= 0:
            data[at:at + PAGE] = page_contents(0, SOME_PAGE, round_ + change)
            return
    raise AssertionError(f'page not found in rounds around {near}')


def static_bit(data: bytearray, _near: int) -> None:
    at = data.find(page_contents(STATIC_OWNER, 1234, 0))
    if at < 0:
        raise AssertionError('static page not found')
    data[at + 2000] ^= 1


def add_tickets(number: int, data: bytearray, _near: int) -> None:
    # The program's file has the tag as well, with the counter at 0.
    for found in re.finditer(rb'TICKETS\0', data):
        [value] = struct.unpack_from('<Q', data, found.start() - 8)
        if value:
            struct.pack_into('<Q', data, found.start() - 8, value + number)
            return
    raise AssertionError('ticket counter not found')


DAMAGES: Dict[str, Tuple[Callable[[bytearray, int], None], str]] = {
    'page-before': (partial(other_round, -1), 'self BAD page'),
    'page-after': (partial(other_round, 1), 'self BAD page'),
    'static-bit': (static_bit, 'self BAD static'),
    'ticket-before': (partial(add_tickets, -5), 'self BAD ticket'),
    'ticket-after': (partial(add_tickets, 5), 'self BAD ticket'),
}


def expect_found(scene: Scene, vm: VM, image: Path, frozen: Path, what: str,
                 pattern: str) -> None:
    try:
        scene.prove_image(image, vm.hardware, frozen)
    except GuestError as found:
        if pattern not in str(found):
            raise AssertionError(f'{what}: expected "{pattern}", the guest '
                                 f'says: {found}') from found
        return
    raise AssertionError(f'{what}: the guest has not noticed')


def damaged_images(scene: Scene) -> None:
    scene.check = SelfCheck(write_mb=32, static_mb=16, pause_us=2000)
    vm = scene.boot(Hardware(ram_mb=256, disk=scene.new_disk()))
    sink = FileSink(scene.image())
    frozen = scene.pause(vm)
    vm.console.settle()
    near = scene.check.last_round(vm)
    snapshot.wait(vm, snapshot.start(vm, sink))
    original = sink.finish().read_bytes()
    scene.disk_check.prove(vm)
    later = snapshot.snapshot_disk(vm, scene.files / 'later.qcow2')
    vm.qmp.cmd('stop')

    image = scene.image('damaged')
    for what, (damage, pattern) in DAMAGES.items():
        data = bytearray(original)
        damage(data, near)
        image.write_bytes(data)
        expect_found(scene, vm, image, frozen, what, pattern)
    image.write_bytes(original)
    expect_found(scene, vm, image, later, 'later disk', 'disk BAD contents')
    # And without any damage it passes.
    image.write_bytes(original)
    scene.prove_image(image, vm.hardware, frozen)


CASES = [Case('damaged-images', damaged_images)]
