"""libvirt's daemon, or QEMU, is killed during a snapshot that libvirt takes.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import shlex
import time
from functools import partial
from typing import List

from .. import disk
from ..domain import NAME, TARGETS, Domain
from ..domain_steps import (HOLDABLE, UNDO_S, Before, arguments,
                            begin_background, begin_early,
                            expect_marker, good, kill_daemon, kill_qemu,
                            processed, start, write_marker)
from ..libvirt import Virsh, VirshError
from ..scene import Case, Scene
from ..steps import expect, refused, wait_until

# Seconds after it is noted: while files are created, and later.
# Several at once, for where files are created in no time.
MOMENTS = [0, 0, 0, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3]
# Of those, at least so many come before the disks have their overlays.
EARLY = 3
# Seconds after the overlays are seen to be merged.
UNDO_MOMENTS = [0, 0.01, 0.03, 0.1]
# Seconds that a slow qemu-img takes.
MERGE_S = 5


def start_again(scene: Scene) -> Domain:
    """A domain, of a daemon that has not started it.

    Of a controller that is none, only who has started the domain has an
    alias.
    """
    domain = start(scene, **HOLDABLE)
    domain.daemon.restart(**HOLDABLE)
    return domain


def daemon_killed(scene: Scene) -> None:
    """The next one gives the domain its disks back."""
    domain = start_again(scene)
    before = Before(scene, domain)
    begun = begin_background(scene, domain, 's1')
    kill_daemon(domain, begun)
    domain.daemon.start(**HOLDABLE)
    before.expect(within=UNDO_S)
    domain.prove()
    good(scene, domain, 's1')


def daemon_killed_early(scene: Scene) -> None:
    """Whatever there is of the snapshot at some moment, nothing is left."""
    domain = start_again(scene)
    before, early = Before(scene, domain), 0
    for moment in MOMENTS:
        begun = begin_early(scene, domain, 's1')
        time.sleep(moment)
        kill_daemon(domain, begun)
        early += domain.daemon.notes(NAME).sources() == domain.disks
        domain.daemon.start(**HOLDABLE)
        before.expect(within=UNDO_S)
        domain.assert_alive()
    if early < EARLY:
        raise AssertionError(f'only {early} were early')
    domain.prove()
    good(scene, domain, 's1')


def daemon_killed_unsaved(scene: Scene) -> None:
    """QEMU has the overlays, but the daemon's notes are those of before."""
    domain = start_again(scene)
    daemon = domain.daemon
    before = Before(scene, domain)
    notes = None
    daemon.hold()
    begun = daemon.begin(*arguments(scene, 's1'))
    while begun.goes_on():
        now = daemon.notes(NAME)
        if now.sources() != domain.disks:
            break
        if '<backgroundSnapshot' in now.status:
            notes = now
    if not notes:
        raise AssertionError('there were no notes of the snapshot')
    wait_until('memory is being saved', lambda: processed(domain) > 0)
    kill_daemon(domain, begun)
    daemon.set_notes(NAME, notes)
    daemon.start(**HOLDABLE)
    before.expect(within=UNDO_S)
    domain.prove()
    good(scene, domain, 's1')


def undo_unsaved(scene: Scene) -> None:
    """QEMU has merged the overlays, but the daemon's notes say otherwise."""
    domain = start_again(scene)
    daemon = domain.daemon
    before = Before(scene, domain)
    begun = begin_background(scene, domain, 's1')
    kill_daemon(domain, begun)
    notes = daemon.notes(NAME)
    overlays = notes.sources()
    daemon.start(**HOLDABLE)
    before.expect(within=UNDO_S)
    daemon.kill()
    daemon.set_notes(NAME, notes)
    for overlay in overlays:
        disk.new_overlay(scene.place, domain.disks[0], overlay)
    daemon.give(*overlays)
    daemon.start(**HOLDABLE)
    before.expect(within=UNDO_S)
    domain.prove()
    good(scene, domain, 's1')


def undo_killed(scene: Scene) -> None:
    """Whoever comes last brings it to its end."""
    domain = start_again(scene)
    daemon = domain.daemon
    before = Before(scene, domain)
    for moment in UNDO_MOMENTS:
        begun = begin_background(scene, domain, 's1')
        kill_daemon(domain, begun)
        daemon.launch(**HOLDABLE)
        wait_until('overlays are merged', lambda:
                   "job='active-commit'" in daemon.notes(NAME).status,
                   every=0.001)
        time.sleep(moment)
        daemon.kill()
        daemon.start(**HOLDABLE)
        before.expect(within=UNDO_S)
        domain.prove()
    good(scene, domain, 's1')


def qemu_killed(with_daemon: bool, scene: Scene) -> None:
    """The disks hold what the guest wrote to their overlays."""
    domain = start(scene, **HOLDABLE)
    before = Before(scene, domain)
    begun = begin_background(scene, domain, 's1')
    write_marker(domain)
    if with_daemon:
        domain.daemon.kill()
    kill_qemu(domain, begun)
    domain.daemon.full_speed()
    if with_daemon:
        domain.daemon.start(**HOLDABLE)
    before.expect_shut_off()
    for path in domain.disks:
        disk.check(scene.place, path)
    expect_marker(domain.disks[1])
    domain.boot()
    good(scene, domain, 's1')


def qemu_killed_early(scene: Scene) -> None:
    """Before the disks have overlays, or after; those may be the user's."""
    domain = start(scene, **HOLDABLE)
    for reuse in (False, True):
        for moment in MOMENTS[::2]:
            overlays = [scene.files / f'{target}.s1' for target in TARGETS]
            if reuse:
                for base, overlay in zip(domain.disks, overlays):
                    disk.new_overlay(scene.place, base, overlay)
                domain.daemon.give(*overlays)
            before = Before(scene, domain)
            begun = begin_early(scene, domain, 's1',
                                *(['--reuse-external'] if reuse else []))
            time.sleep(moment)
            kill_qemu(domain, begun)
            before.expect(shut_off=True, within=UNDO_S)
            for path in domain.disks:
                disk.check(scene.place, path)
            domain.boot()
    good(scene, domain, 's2')


def hidden(scene: Scene) -> None:
    """Overlays that cannot be seen for a while have not been merged."""
    domain = start(scene, **HOLDABLE)
    folder = scene.files / 'hidden'
    folder.mkdir()
    domain.daemon.give(folder)
    paths = [folder / target for target in TARGETS]
    begun = begin_background(scene, domain, 's1', *(
        word for target, path in zip(TARGETS, paths) for word in
        ('--diskspec', f'{target},snapshot=external,file={path}')))
    write_marker(domain)
    folder.chmod(0)
    kill_qemu(domain, begun)
    domain.daemon.full_speed()
    wait_until('it is shut off', lambda: domain.state() == 'shut off')
    expect('disks', domain.sources(), paths)
    folder.chmod(0o755)
    expect_marker(paths[1])
    domain.boot()
    good(scene, domain, 's2')


def slow_merge(domain: Domain) -> None:
    """Have the daemon's qemu-img take its time."""
    command = domain.daemon.home / 'bin/qemu-img'
    command.unlink()
    command.write_text(f'#!/bin/sh\nsleep {MERGE_S}\nexec '
                       f'{shlex.quote(str(domain.place.qemu_img))} "$@"\n')
    command.chmod(0o755)


def transient(scene: Scene) -> None:
    """Such a domain is not created again before its disks are merged."""
    domain = start(scene, **HOLDABLE)
    daemon = domain.daemon
    xml = scene.logs / 'domain.xml'
    xml.write_text(domain.virsh('dumpxml', '--inactive'))
    domain.close()
    domain.virsh('undefine')
    slow_merge(domain)

    def create() -> Domain:
        daemon.virsh('create', xml, '--paused')
        domain.connect()
        domain.virsh('resume')
        return domain

    domain.boot(create)
    begun = begin_background(scene, domain, 's1')
    write_marker(domain)
    domain.virsh('destroy')
    refused('a domain whose disks are merged', 'snapshot', lambda:
            daemon.virsh('create', xml), VirshError)
    refused('s1', '', lambda: begun.finish(UNDO_S), VirshError)
    daemon.full_speed()
    expect('domains', daemon.virsh('list', '--all', '--name'), '')
    expect('files', list(scene.files.glob('*s1')), [])
    expect_marker(domain.disks[1])
    # Neither are there notes of it.
    daemon.restart(**HOLDABLE)
    expect('domains', daemon.virsh('list', '--all', '--name'), '')
    domain.boot(create)
    good(scene, domain, 's1')


def autodestroyed(scene: Scene) -> None:
    """With who has started it; that discards the snapshot's job."""
    domain = start(scene, **HOLDABLE)
    domain.close()
    slow_merge(domain)
    before = Before(scene, domain)
    owners: List[Virsh] = []

    def start_owned() -> Domain:
        owners.append(domain.daemon.begin(
            f'start {NAME} --paused --autodestroy; '
            f'event {NAME} --loop --all'))
        wait_until('it is there', lambda: domain.state() == 'paused')
        domain.connect()
        domain.virsh('resume')
        return domain

    domain.boot(start_owned)
    begun = begin_background(scene, domain, 's1')
    owners[-1].kill()
    refused('s1', '', lambda: begun.finish(UNDO_S), VirshError)
    before.expect(within=UNDO_S)
    domain.daemon.full_speed()
    domain.boot()
    good(scene, domain, 's1')


CASES = [
    Case(f'libvirt-{name}', run, libvirt=True) for name, run in (
        ('daemon-killed', daemon_killed),
        ('daemon-killed-early', daemon_killed_early),
        ('daemon-killed-unsaved', daemon_killed_unsaved),
        ('undo-killed', undo_killed), ('undo-unsaved', undo_unsaved),
        ('qemu-killed', partial(qemu_killed, False)),
        ('both-killed', partial(qemu_killed, True)),
        ('qemu-killed-early', qemu_killed_early), ('hidden', hidden),
        ('transient', transient), ('autodestroyed', autodestroyed),
    )]
