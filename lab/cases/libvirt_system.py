"""The daemon of the whole machine: its QEMUs, and their files, are others'.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import json
from pathlib import Path

from .. import disk
from ..domain_steps import (ABORT_S, ABORTED, HOLDABLE, UNDO_S, Before,
                            begin_background, good, kill_daemon, kill_qemu)
from ..domain_steps import start as start_domain
from ..domain import Domain
from ..libvirt import SystemDaemon, VirshError
from ..scene import Case, Scene
from ..steps import expect, refused, wait_until

# libvirt gives it to each QEMU, in a namespace.
DEVICE = Path('/dev/userfaultfd')


def start(scene: Scene) -> Domain:
    return start_domain(scene, kind=SystemDaemon,
                        snapshot_memory_background='require', **HOLDABLE)


def access(scene: Scene) -> None:
    """QEMU gets at all that it needs, in a namespace of its own."""
    domain = start(scene)
    traps = json.loads(domain.virsh(
        'qemu-monitor-command',
        '{"execute": "query-snapshot-write-traps"}'))['return']
    for trap in traps:
        if DEVICE.exists() and str(DEVICE) in trap.get('reason', ''):
            raise AssertionError(f'{trap["trap"]}: {trap["reason"]}')
    good(scene, domain, 's1')


def undone(scene: Scene) -> None:
    """By QEMU; by the next daemon; and without QEMU."""
    domain = start(scene)
    before = Before(scene, domain)
    begun = begin_background(scene, domain, 's1')
    domain.virsh('domjobabort')
    refused('s1', ABORTED, lambda: begun.finish(ABORT_S), VirshError)
    before.expect()

    begun = begin_background(scene, domain, 's1')
    kill_daemon(domain, begun)
    domain.daemon.start(**HOLDABLE)
    wait_until('its disks', lambda: domain.sources() == domain.disks, UNDO_S)
    domain.prove()

    begun = begin_background(scene, domain, 's1')
    kill_qemu(domain, begun)
    before.expect(shut_off=True, within=UNDO_S)
    for path in domain.disks:
        disk.check(scene.place, path)
    expect('owners', [path.owner() for path in domain.disks], ['root'] * 2)
    domain.boot()
    good(scene, domain, 's2')


CASES = [
    Case('libvirt-system-access', access, libvirt=True),
    Case('libvirt-system-undone', undone, libvirt=True),
]
