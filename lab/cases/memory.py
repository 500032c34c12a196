"""Each kind of memory with each write trap.

The guests leave most of their memory alone: a snapshot must not take from the
host what they have not touched.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import functools

from .. import snapshot
from ..host import MIB, Skip
from ..memory import BOOT_MB, KINDS, Kind
from ..qmp import ExecuteError
from ..scene import Case, Scene
from ..vm import VM, Hardware
from ..workload import SelfCheck
from .traps import TRAPS

RAM_MB = BOOT_MB + 512
BUFFER_MB = 16
# What else may grow meanwhile: translated code, pages that Linux touches,
# huge ones among them.
ELSE_MB = 64


def expect_uses(vm: VM, kind: Kind) -> None:
    if kind.uses:
        line, much = kind.uses
        size = vm.rollup(line)
        if (size > ELSE_MB * MIB) != much:
            raise AssertionError(f'{line} is {size // MIB} MiB: the setting '
                                 'has no effect')


def expect_refused(vm: VM, trap: str, reason: str) -> None:
    """A trap that cannot be is not taken, for the reason that was given."""
    snapshot.set_trap(vm, trap)
    try:
        snapshot.enable(vm)
    except ExecuteError as refusal:
        if reason not in str(refusal):
            raise AssertionError(f'{trap} was refused with "{refusal}", and '
                                 f'is out for: {reason}') from refusal
        return
    raise AssertionError(f'{trap} was accepted: {reason}')


def round_trip(scene: Scene, vm: VM, trap: str) -> None:
    before = vm.memory_used()
    scene.round_trip(vm)
    grown = (vm.memory_used() - before) // MIB
    scene.note(f'{trap} {grown:+} MiB')
    if snapshot.used_trap(vm) != trap:
        raise AssertionError(f'used {snapshot.used_trap(vm)}, not {trap}')
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
            expect_refused(vm, trap, reason)
            continue
        round_trip(scene, vm, trap)


CASES = [Case(f'memory-{name}', functools.partial(memory, name))
         for name in KINDS]
