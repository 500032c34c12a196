"""Snapshots that libvirt takes of a domain and its memory, by virsh alone.

SPDX-License-Identifier: GPL-2.0-or-later
"""
from functools import partial
from pathlib import Path
from typing import List

from .. import disk, env
from ..domain import NAME, TARGETS, Domain
from ..libvirt import Daemon, Events
from ..scene import Case, Scene
from ..workload import SelfCheck


def start(scene: Scene, emulator: Path = env.QEMU, **settings: object
          ) -> Domain:
    """A domain of our libvirt's, which is busy."""
    scene.check = SelfCheck(write_mb=64, static_mb=16, pause_us=500)
    domain = Domain(scene, Daemon(scene, env.LIBVIRT, **settings), emulator)
    domain.boot()
    return domain


def arguments(scene: Scene, name: str, *more: str) -> List[str]:
    """Of a snapshot of all that there is."""
    return ['snapshot-create-as', NAME, name, '--memspec',
            f'file={scene.image(name)},snapshot=external', *(
                word for target in TARGETS for word in (
                    '--diskspec', f'{target},snapshot=external,'
                    f'file={scene.files}/{target}.{name}')), *more]


def expect(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise AssertionError(f'{what}: {found}, expected {expected}')


def restore_unmodified(scene: Scene, image: Path, frozen: List[Path]) -> None:
    """Both libvirt and QEMU are those without the series."""
    daemon = Daemon(scene, env.LIBVIRT_STOCK, 'stock')
    daemon.give(image, *frozen)
    domain = Domain(scene, daemon, env.STOCK, 'restored-')
    xml = scene.files / 'restored.xml'
    xml.write_text(domain.virsh('dumpxml', '--inactive'))
    for path, base in zip(domain.disks, frozen):
        disk.new_overlay(scene.place, base, path)
    daemon.give(*domain.disks)
    domain.virsh('undefine')
    daemon.virsh('restore', image, '--xml', xml)
    domain.connect()
    domain.prove()


def round_trip(image_format: str, scene: Scene) -> None:
    """The domain is reverted, and the image good for unmodified programs."""
    domain = start(scene, snapshot_image_format=image_format)
    daemon = domain.daemon
    events = Events(scene, daemon)
    daemon.virsh(*arguments(scene, 's1'))
    expect('events', events.lifecycle(), ['Suspended', 'Resumed'])
    expect('disks', domain.sources(), [
        scene.files / f'{target}.s1' for target in TARGETS])
    domain.prove()
    domain.virsh('snapshot-revert', 's1')
    domain.connect()
    domain.prove()
    domain.close()
    restore_unmodified(scene, scene.image('s1'), domain.disks)


CASES = [
    Case(f'libvirt-{name}', run, libvirt=True) for name, run in (
        *((name, partial(round_trip, name))
          for name in ('raw', 'zstd', 'sparse')),
    )]
