"""Requests that must be refused, clearly, while the guest runs on.

SPDX-License-Identifier: GPL-2.0-or-later
"""
from typing import List, Tuple

from .. import snapshot
from ..hardware import Hardware
from ..host import MIB
from ..scene import Case, Scene
from ..steps import (begin, expect_active, expect_end, finish, refused,
                     still_clean)
from ..vm import VM

CONFLICTS = ['multifd', 'mapped-ram', 'xbzrle', 'postcopy-ram',
             'auto-converge']


def set_capabilities(vm: VM, *names: str, on: bool = True) -> None:
    vm.qmp.cmd('migrate-set-capabilities', capabilities=[
        {'capability': name, 'state': on} for name in names])


def capability_conflicts(scene: Scene) -> None:
    vm = scene.boot()
    for other in CONFLICTS:
        refused(f'background-snapshot with {other}',
                'background-snapshot|' + other,
                lambda o=other: set_capabilities(vm, 'background-snapshot', o))
    # In either order.
    set_capabilities(vm, 'background-snapshot')
    refused('multifd after background-snapshot', 'background-snapshot',
            lambda: set_capabilities(vm, 'multifd'))
    still_clean(scene, vm)
    scene.round_trip(vm)


def destinations(scene: Scene) -> None:
    vm = scene.boot()
    snapshot.enable(vm)
    bad: List[Tuple[str, str]] = [
        ('nosuch:thing', 'nosuch|protocol|uri'),
        ('file:/nonexistent/folder/image', 'No such file'),
        ('fd:nobody', 'nobody'),
    ]
    for uri, pattern in bad:
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


def buffer_sizes(scene: Scene) -> None:
    vm = scene.boot(Hardware(ram_mb=384))
    default = vm.qmp.cmd('query-migrate-parameters')['snapshot-buffer-size']
    if default != 64 * MIB:
        raise AssertionError(f'default is {default}, expected 64 MiB')
    for size in (0, MIB - 1, 385 * MIB, 1 << 62):
        refused(f'buffer of {size}', 'snapshot-buffer-size',
                lambda s=size: vm.qmp.cmd('migrate-set-parameters',
                                          snapshot_buffer_size=s))
        now = vm.qmp.cmd('query-migrate-parameters')['snapshot-buffer-size']
        if now != default:
            raise AssertionError(f'{size} was refused, but now it is {now}')
    for size in (MIB, 384 * MIB):
        vm.qmp.cmd('migrate-set-parameters', snapshot_buffer_size=size)
        now = vm.qmp.cmd('query-migrate-parameters')['snapshot-buffer-size']
        if now != size:
            raise AssertionError(f'set to {size}, but shown as {now}')
    still_clean(scene, vm)
    scene.round_trip(vm)


def while_one_runs(scene: Scene) -> None:
    vm = scene.boot()
    begun = begin(scene, vm)
    refused('a second migrate', 'migration|progress',
            lambda: vm.qmp.cmd('migrate', uri='file:/dev/null'))
    refused('a capability', 'migration|progress',
            lambda: set_capabilities(vm, 'background-snapshot', on=False))
    expect_active(vm, 'refused')
    finish(scene, vm, begun)


CASES = [
    Case('capability-conflicts', capability_conflicts),
    Case('destinations', destinations),
    Case('buffer-sizes', buffer_sizes),
    Case('while-one-runs', while_one_runs),
]
