"""Each kind of memory with each write trap.

The guests leave most of their memory alone: a snapshot must not take from the
host what they have not touched.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import functools
import re

from .. import snapshot
from ..hardware import Hardware
from ..host import MIB, Skip
from ..memory import BOOT_MB, KINDS, Kind
from ..scene import Case, Scene
from ..snapshot import TRAPS
from ..steps import expect_trap, refused
from ..vm import VM
from ..workload import SelfCheck

RAM_MB = BOOT_MB + 512
BUFFER_MB = 16
# What else may grow meanwhile: translated code, pages that Linux touches,
# huge ones among them.
ELSE_MB = 64


def expect_uses(vm: VM, kind: Kind) -> None:
    if kind.uses:
        line, much = kind.uses
        size = vm.process.memory('smaps_rollup', line)
        if (size > ELSE_MB * MIB) != much:
            raise AssertionError(f'{line} is {size // MIB} MiB: the setting '
                                 'has no effect')


def round_trip(scene: Scene, vm: VM, trap: str) -> None:
    before = vm.process.memory_used()
    scene.round_trip(vm)
    grown = (vm.process.memory_used() - before) // MIB
    scene.note(f'{trap} {grown:+} MiB')
    expect_trap(vm, trap)
    if grown > BUFFER_MB + ELSE_MB:
        raise AssertionError(f'{trap}: the snapshot took {grown} MiB')


def memory(name: str, scene: Scene) -> None:
    kind = KINDS[name]
    kind.prepare(scene, RAM_MB)
    # More than there is without what is plugged in.
    scene.check = SelfCheck(write_mb=24, static_mb=150 if kind.plug else 8)
    vm = scene.boot(Hardware(ram_mb=RAM_MB, memory=name))
    expect_uses(vm, kind)
    vm.qmp.cmd('migrate-set-parameters',
               snapshot_buffer_size=BUFFER_MB * MIB)
    for trap in TRAPS:
        try:
            scene.choose_trap(vm, trap)
        except Skip:
            reason = snapshot.traps(vm)[trap]
            scene.note(f'no {trap}: {reason}')
            # It is not taken, for the reason that was given.
            snapshot.set_trap(vm, trap)
            refused(trap, re.escape(reason), lambda: snapshot.enable(vm))
            # Which memory that is, and what could be had instead, unless the
            # host has no userfaultfd for any.
            if kind.regular_file and not re.search(
                    'ram0.*(anonymous|shmem)|Cannot open userfaultfd', reason):
                raise AssertionError(f'{trap}: what would help? {reason}')
            continue
        round_trip(scene, vm, trap)


CASES = [Case(f'memory-{name}', functools.partial(memory, name))
         for name in KINDS]
