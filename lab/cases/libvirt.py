"""Snapshots that libvirt takes of a domain and its memory, by virsh alone.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import time
from functools import partial
from pathlib import Path
from typing import Any, List

from .. import disk, env
from ..domain import NAME, TARGETS, Domain
from ..domain_steps import (ABORT_S, ABORTED, BUSY, HOLDABLE, UNDO_S, Before,
                            arguments, begin_background, begin_held, good,
                            kill_daemon, processed, revert, start)
from ..host import mount_tmpfs, needs_root
from ..libvirt import Daemon, Events, VirshError
from ..scene import Case, Scene
from ..steps import expect, refused, wait_until

# Events until an image's memory is being saved, and what the domain is then.
BACKGROUND = ['Suspended', 'Resumed'], 'running'
PAUSED = ['Suspended'], 'paused'
LIVE: Any = [], 'running'
WAS_PAUSED: Any = [], 'paused'


def restore_unmodified(scene: Scene, image: Path, frozen: List[Path]) -> None:
    """Both libvirt and QEMU are those without the series."""
    daemon = Daemon(scene, env.LIBVIRT_STOCK, 'stock')
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
    domain = start(scene, snapshot_image_format=image_format,
                   snapshot_memory_background='require')
    domain.daemon.virsh(*arguments(scene, 's1'))
    expect('disks', domain.sources(), [
        scene.files / f'{target}.s1' for target in TARGETS])
    domain.prove()
    revert(domain, 's1')
    domain.close()
    restore_unmodified(scene, scene.image('s1'), domain.disks)


def saved(scene: Scene, domain: Domain, name: str, how: Any, *more: str,
          then: str = 'running') -> None:
    """A snapshot is taken in one of the ways, and the domain is @then."""
    wanted, state = how
    events = Events(scene, domain.daemon, NAME)
    begun = begin_held(scene, domain, name, *more)
    try:
        wait_until(f'{wanted} in {events.lifecycle()}',
                   lambda: len(events.lifecycle()) >= len(wanted), 10)
        # None that comes too early.
        time.sleep(1)
        expect(f'{name}: events', events.lifecycle(), wanted)
        expect(f'{name}: state', domain.state(), state)
        if not begun.goes_on():
            raise AssertionError(f'{name} has ended')
    finally:
        domain.daemon.full_speed()
    begun.finish()
    expect(f'{name}: state at the end', domain.state(), then)
    if then == 'running':
        wait_until(f'{name}: last events', lambda: events.lifecycle()[-2:] ==
                   ['Suspended', 'Resumed'])


def flags(scene: Scene) -> None:
    """Which snapshots are taken while the domain runs."""
    domain = start(scene, **HOLDABLE)
    saved(scene, domain, 'all', BACKGROUND)
    saved(scene, domain, 'atomic', BACKGROUND, '--atomic')
    saved(scene, domain, 'one', BACKGROUND, '--diskspec', 'vdb,snapshot=no')
    saved(scene, domain, 'live', LIVE, '--live')
    for base, target in zip(domain.sources(), TARGETS):
        overlay = scene.files / f'{target}.reused'
        disk.new_overlay(scene.place, base, overlay)
        domain.daemon.give(overlay)
    saved(scene, domain, 'reused', BACKGROUND, '--reuse-external')
    saved(scene, domain, 'manual', PAUSED, '--diskspec', 'vdb,snapshot=manual',
          then='paused')
    # QEMU saves none that stands still since it was saved.
    domain.virsh('resume')
    domain.virsh('suspend')
    saved(scene, domain, 'stopped', WAS_PAUSED, then='paused')
    domain.virsh('resume')
    domain.prove()
    saved(scene, domain, 'halted', PAUSED, '--halt', then='shut off')
    for name in ('reused', 'all'):
        revert(domain, name)


def forbidden(scene: Scene) -> None:
    domain = start(scene, snapshot_memory_background='forbid', **HOLDABLE)
    saved(scene, domain, 'forbidden', PAUSED)
    domain.daemon.restart(**HOLDABLE)
    saved(scene, domain, 'allowed', BACKGROUND)
    revert(domain, 'forbidden')


def stock_qemu(scene: Scene) -> None:
    """Without QEMU's help it is as it always was, or refused."""
    domain = start(scene, env.STOCK, snapshot_memory_background='require',
                   **HOLDABLE)
    before, events = Before(scene, domain), Events(scene, domain.daemon, NAME)
    refused('a background snapshot', 'background snapshots .*not possible',
            lambda: domain.daemon.virsh(*arguments(scene, 'required')),
            VirshError)
    before.expect()
    domain.prove()
    expect('events', events.lifecycle(), [])
    domain.daemon.restart(**HOLDABLE)
    saved(scene, domain, 'allowed', PAUSED)
    revert(domain, 'allowed')


def jobs(scene: Scene) -> None:
    """What can be told of a snapshot, and done to the domain, meanwhile."""
    domain = start(scene, **HOLDABLE)
    daemon = domain.daemon
    begun = begin_background(scene, domain, 'first')
    done = processed(domain)
    wait_until('progress', lambda: processed(domain) > done)
    domain.virsh('suspend')
    expect('state', domain.state(), 'paused')
    device = scene.logs / 'rng.xml'
    device.write_text("<rng model='virtio'><backend model='random'>"
                      "/dev/urandom</backend></rng>")
    state = Before(scene, domain)
    # Each waits for half a minute.
    for name, other in [(command[0], daemon.begin(*command)) for command in (
            arguments(scene, 'second'), *(
                [command[0], NAME, *command[1:]] for command in (
                    ['attach-disk', domain.disks[0], 'vdc'], ['resume'],
                    ['shutdown', '--mode', 'acpi'],
                    ['reboot', '--mode', 'acpi'], ['reset'], ['managedsave'],
                    ['save', scene.files / 'saved'],
                    ['detach-disk', 'vdb', '--live'],
                    ['attach-device', device, '--live'],
                    ['setmem', '65536', '--live'], ['undefine'],
                    ['blockcommit', 'vda', '--active'],
                    ['blockcopy', 'vda', scene.files / 'copy',
                     '--transient-job'],
                    ['migrate', 'qemu+ssh://nowhere/session', '--p2p'])))]:
        refused(name, BUSY, other.finish, VirshError)
    state.expect()
    daemon.full_speed()
    begun.finish()
    expect('state', domain.state(), 'paused')
    domain.virsh('resume')
    revert(domain, 'first')

    before = Before(scene, domain)
    begun = begin_background(scene, domain, 'aborted')
    domain.virsh('domjobabort')
    refused('aborted', ABORTED, lambda: begun.finish(ABORT_S),
            VirshError)
    domain.assert_alive()
    before.expect()
    domain.prove()
    good(scene, domain, 'after-abort')

    before = Before(scene, domain)
    begun = begin_background(scene, domain, 'destroyed')
    domain.virsh('destroy')
    refused('destroyed', '', lambda: begun.finish(ABORT_S), VirshError)
    before.expect(shut_off=True)


def failing(scene: Scene) -> None:
    """The image cannot be written, at once or after a while."""
    needs_root('a folder that the daemon cannot write to')
    domain = start(scene)
    before, events = Before(scene, domain), Events(scene, domain.daemon, NAME)
    refused('no permission', 'Permission denied', lambda: domain.daemon.virsh(
        *arguments(scene, 's1', image=scene.logs / 's1')), VirshError)
    before.expect()
    expect('events', events.lifecycle(), [])

    room = scene.files / 'tmpfs'
    mount_tmpfs(scene, room, 'size=40m,mode=777')
    before = Before(scene, domain)
    refused('no room', 'No space left', lambda: domain.daemon.virsh(
        *arguments(scene, 's1', image=room / 's1')), VirshError)
    domain.assert_alive()
    expect('images', list(room.iterdir()), [])
    before.expect()
    # For the snapshot, and when the overlays have been merged.
    wait_until('its events', lambda: events.lifecycle() == [
        'Suspended', 'Resumed'] * 2)
    domain.prove()

    # The same if the overlays have no more room either, and the guest stops.
    before = Before(scene, domain)
    full = room / 'full'
    full.write_bytes(bytes(30 << 20))
    refused('no room at all', '', lambda: domain.daemon.virsh(*arguments(
        scene, 's1', *(word for target in TARGETS for word in (
            '--diskspec', f'{target},snapshot=external,file={room}/{target}')),
        image=room / 's1')), VirshError)
    domain.assert_alive()
    expect('images', list(room.iterdir()), [full])
    before.expect()
    domain.prove()

    metadata = domain.daemon.home / '.config/libvirt/qemu/snapshot' / NAME
    metadata.mkdir(parents=True, exist_ok=True, mode=0o555)
    refused('no metadata', 'Permission denied|metadata', lambda:
            domain.daemon.virsh(*arguments(scene, 's1')), VirshError)
    domain.assert_alive()
    before.expect()
    metadata.rmdir()
    good(scene, domain, 's1')


def stalls(scene: Scene) -> None:
    """The guest is not to wait for the image, which is slow.

    Then, as told, the domain keeps the overlays.
    """
    settings = {**HOLDABLE, 'snapshot_memory_buffer_size': 1,
                'snapshot_memory_stall_limit': 100}
    domain = start(scene, **settings)
    domain.daemon.hold()
    before = Before(scene, domain)
    refused('a wait', 'stall-limit', lambda: domain.daemon.virsh(
        *arguments(scene, 's1')), VirshError)
    domain.assert_alive()
    before.expect()
    domain.daemon.restart(snapshot_memory_keep_overlays=1, **settings)
    refused('a wait', 'stall-limit', lambda: domain.daemon.virsh(
        *arguments(scene, 's2')), VirshError)
    domain.assert_alive()
    expect('disks', domain.sources(), [
        scene.files / f'{target}.s2' for target in TARGETS])
    expect('snapshots', domain.virsh('snapshot-list', '--name'), '')
    domain.prove()
    domain.daemon.restart(**HOLDABLE)
    good(scene, domain, 's3')


def settings_of_qemu(scene: Scene) -> None:
    """QEMU does not keep what it is told for an image, and one snapshot."""
    settings = {**HOLDABLE, 'snapshot_memory_buffer_size': 1 << 20,
                'snapshot_memory_stall_limit': 5000}
    domain = start(scene, **{**settings, 'snapshot_image_format': 'sparse'})

    def hmp(command: str) -> List[str]:
        return domain.virsh('qemu-monitor-command', '--hmp',
                            command).splitlines()

    def kept() -> List[str]:
        return [line for what in ('parameters', 'capabilities')
                for line in hmp(f'info migrate_{what}')
                # libvirt sets it after each migration to a file
                if not line.startswith('max-bandwidth')]
    before = kept()
    domain.daemon.virsh(*arguments(scene, 's1'))
    expect('settings after a snapshot', kept(), before)
    # It writes a stream, not such an image.
    expect('savevm', hmp('savevm first'), [])
    revert(domain, 's1')
    expect('settings after it was reverted', kept(), before)
    expect('savevm', hmp('savevm second'), [])

    domain.daemon.restart(**settings)
    whole = Before(scene, domain)
    kill_daemon(domain, begin_background(scene, domain, 's2'))
    domain.daemon.start()
    whole.expect(within=UNDO_S)
    expect('settings after the daemon has ended', kept(), before)
    domain.prove()


CASES = [
    Case(f'libvirt-{name}', run, libvirt=True) for name, run in (
        *((name, partial(round_trip, name))
          for name in ('raw', 'zstd', 'sparse')),
        ('flags', flags), ('forbidden', forbidden),
        ('stock-qemu', stock_qemu), ('jobs', jobs), ('failing', failing),
        ('stalls', stalls), ('settings', settings_of_qemu),
    )]
