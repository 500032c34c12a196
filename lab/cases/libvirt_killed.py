"""libvirt's daemon, or QEMU, is killed during a snapshot that libvirt takes.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import time
from functools import partial

from .. import disk
from ..domain import NAME, TARGETS, Domain
from ..domain_steps import (HOLDABLE, UNDO_S, Before, arguments,
                            begin_background, begin_early, expect, good,
                            kill_daemon, kill_qemu, processed, start)
from ..scene import Case, Scene
from ..steps import wait_until

# Seconds after it is noted: while files are created, and later.
MOMENTS = [0, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3]
# Of those, at least so many come before the disks have their overlays.
EARLY = 3
# Seconds after the overlays are seen to be merged.
UNDO_MOMENTS = [0, 0.01, 0.03, 0.1]
MARKER, MARKER_MB = 'written during the snapshot', 40


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
    mark = domain.console.mark()
    domain.console.run(f'echo "{MARKER}" | dd of=/dev/vdb bs=1M conv=fsync '
                       f'seek={MARKER_MB} 2>/dev/null; echo written')
    domain.console.wait('^written', mark, 30)
    if with_daemon:
        domain.daemon.kill()
    kill_qemu(domain, begun)
    domain.daemon.full_speed()
    if with_daemon:
        domain.daemon.start(**HOLDABLE)
    wait_until('it is shut off', lambda: domain.state() == 'shut off')
    before.expect(shut_off=True, within=UNDO_S)
    for path in domain.disks:
        disk.check(scene.place, path)
    expect('the disk', disk.contents(domain.disks[1], MARKER_MB, len(MARKER)),
           MARKER.encode())
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


CASES = [
    Case(f'libvirt-{name}', run, libvirt=True) for name, run in (
        ('daemon-killed', daemon_killed),
        ('daemon-killed-early', daemon_killed_early),
        ('daemon-killed-unsaved', daemon_killed_unsaved),
        ('undo-killed', undo_killed), ('undo-unsaved', undo_unsaved),
        ('qemu-killed', partial(qemu_killed, False)),
        ('both-killed', partial(qemu_killed, True)),
        ('qemu-killed-early', qemu_killed_early),
    )]
