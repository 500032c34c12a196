"""What libvirt makes of a snapshot that has failed, and of one left behind.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import os
import re
import signal
import time
from functools import partial
from typing import Callable

from ..domain import NAME, TARGETS, Domain
from ..domain_steps import (ABORT_S, ABORTED, HOLDABLE, UNDO_S, Before,
                            arguments, begin_background, expect_marker, good,
                            in_guest, kill_daemon, kill_qemu, power_off,
                            revert, start, write_marker)
from ..libvirt import VirshError
from ..scene import Case, Scene
from ..steps import expect, refused, wait_until

NOT_MERGED = 'could not be merged back'
# Seconds after the overlays are seen to be merged.
MOMENTS = [0, 0.03]
# What the guest writes in between, so that to merge it takes a while.
WRITTEN_MB = 16
OFFSET_MB, PART_MB = 3, 8


def fail_undo(scene: Scene, domain: Domain, name: str) -> None:
    """An aborted snapshot whose overlays stay: QEMU may not write below."""
    for path in domain.disks:
        path.chmod(0o444)
    begun = begin_background(scene, domain, name)
    domain.virsh('domjobabort')
    refused(name, NOT_MERGED, lambda: begun.finish(ABORT_S), VirshError)
    domain.daemon.full_speed()
    domain.assert_alive()
    expect('disks', domain.sources(), [
        scene.files / f'{target}.{name}' for target in TARGETS])


def allow_undo(domain: Domain) -> None:
    for path in domain.disks:
        path.chmod(0o644)


def undo_retried(scene: Scene) -> None:
    """By the next snapshot, and by the next daemon, which leave all else."""
    domain = start(scene, **HOLDABLE)
    fail_undo(scene, domain, 's1')
    # The user's, from now on.
    mine = scene.image('s1')
    mine.write_text('mine')
    refused('s2', 'Permission denied', lambda: domain.daemon.virsh(
        *arguments(scene, 's2')), VirshError)
    domain.assert_alive()
    overlays = domain.sources()
    domain.daemon.restart(**HOLDABLE)
    expect('disks', domain.sources(), overlays)
    domain.assert_alive()
    allow_undo(domain)
    good(scene, domain, 's2')
    expect('files', list(scene.files.glob('*s1')), [mine])
    expect('image', mine.read_text(), 'mine')


def undo_overtaken(scene: Scene) -> None:
    """What became of the disks since is none of the undo's business.

    Neither is a user's job that makes something of them.
    """
    domain = start(scene, **HOLDABLE)
    fail_undo(scene, domain, 's1')
    domain.disks[1].chmod(0o644)
    domain.virsh('blockcommit', 'vdb', '--active')
    domain.daemon.restart(**HOLDABLE)
    # The daemon tries to undo the snapshot.
    time.sleep(1)
    wait_until('its job is ready', lambda: "ready='yes'" in domain.virsh(
        'dumpxml'))
    domain.virsh('blockjob', 'vdb', '--pivot')
    allow_undo(domain)
    domain.virsh('blockpull', 'vda', '--wait')
    good(scene, domain, 's2')


def undo_by_hand(scene: Scene) -> None:
    """Files of the same names are another snapshot's then."""
    domain = start(scene, **HOLDABLE)
    fail_undo(scene, domain, 's1')
    allow_undo(domain)
    for target, overlay in zip(TARGETS, domain.sources()):
        domain.virsh('blockcommit', target, '--active', '--pivot')
        overlay.unlink()
    expect('disks', domain.sources(), domain.disks)
    domain.daemon.virsh(*arguments(scene, 's1', '--live'))
    domain.daemon.virsh(*arguments(scene, 's2'))
    revert(domain, 's2')
    revert(domain, 's1')


def undo_copied(scene: Scene) -> None:
    """What the user has copied the overlay to is the disk then.

    The overlay has what the guest wrote until then: it is not removed.
    """
    domain = start(scene, **HOLDABLE)
    fail_undo(scene, domain, 's1')
    overlay = domain.sources()[0]
    copy = scene.files / 'copy'
    domain.virsh('blockcopy', 'vda', copy, '--wait', '--pivot',
                 '--transient-job')
    allow_undo(domain)
    good(scene, domain, 's2')
    if not overlay.exists():
        raise AssertionError(f'{overlay} was removed')


def undo_saved(scene: Scene) -> None:
    """What was saved with its overlays keeps them.

    The daemon ends when the domain is saved, before it has noted that.
    """
    domain = start(scene, **HOLDABLE)
    fail_undo(scene, domain, 's1')
    allow_undo(domain)
    write_marker(domain)
    notes, overlays = domain.daemon.notes(NAME), domain.sources()
    image = scene.files / 'saved'
    domain.virsh('save', image)
    domain.daemon.kill()
    domain.daemon.set_notes(NAME, notes)
    domain.daemon.start(**HOLDABLE)
    wait_until('it is shut off', lambda: domain.state() == 'shut off')
    # It would merge them now.
    time.sleep(3)
    domain.daemon.virsh('restore', image)
    domain.connect()
    domain.prove()
    expect('disks', domain.sources(), overlays)
    domain.close()
    expect_marker(overlays[1])


def end_by_signal(domain: Domain, pid: int) -> None:
    os.kill(pid, signal.SIGTERM)


def end_by_virsh(domain: Domain, pid: int) -> None:
    domain.virsh('destroy')


def undo_terminated(end: Callable[[Domain, int], None], scene: Scene) -> None:
    """QEMU is told to end while overlays are merged, and cancels that."""
    domain = start(scene, **HOLDABLE)
    before = Before(scene, domain)
    for moment in MOMENTS:
        begun = begin_background(scene, domain, 's1')
        in_guest(domain, 'dd if=/dev/urandom of=/dev/vdb bs=1M seek=42 '
                 f'count={WRITTEN_MB} conv=fsync 2>/dev/null')
        write_marker(domain)
        [pid] = domain.daemon.pids()
        domain.virsh('domjobabort')
        wait_until('overlays are merged', lambda: not begun.goes_on() or
                   "job='active-commit'" in domain.daemon.notes(NAME).status,
                   every=0.001)
        time.sleep(moment)
        end(domain, pid)
        refused('s1', '', lambda: begun.finish(UNDO_S), VirshError)
        before.expect_shut_off()
        expect_marker(domain.disks[1])
        domain.daemon.full_speed()
        domain.boot()
    good(scene, domain, 's1')


def powered_off_unseen(scene: Scene) -> None:
    """By the guest, while there is no daemon; QEMU waits for one."""
    domain = start(scene, **HOLDABLE)
    before = Before(scene, domain)
    begun = begin_background(scene, domain, 's1')
    write_marker(domain)
    kill_daemon(domain, begun)
    power_off(domain)
    log = scene.logs / 'kernel.log'
    wait_until('it is down', lambda: 'Power down' in log.read_text())
    domain.daemon.full_speed()
    domain.daemon.start(**HOLDABLE)
    before.expect_shut_off()
    expect_marker(domain.disks[1])
    domain.boot()
    good(scene, domain, 's1')


def part_of_file(scene: Scene) -> None:
    """Without QEMU, nobody knows where in its file such a disk is."""
    domain = start(scene, **HOLDABLE)
    domain.close()
    file, xml = scene.files / 'whole', scene.logs / 'part.xml'
    whole = bytes([7]) * ((OFFSET_MB + PART_MB) << 20)
    file.write_bytes(whole)
    domain.daemon.give(file)
    xml.write_text(f"""<disk type='file' device='disk'>
        <driver name='qemu' type='raw'/><source file='{file}'><slices>
        <slice type='storage' offset='{OFFSET_MB << 20}'
               size='{PART_MB << 20}'/></slices></source>
        <target dev='vdc' bus='virtio'/></disk>""")
    domain.virsh('attach-device', xml, '--config')
    domain.boot()
    overlay = scene.files / 'vdc.s1'
    more = ['--diskspec', f'vdc,snapshot=external,file={overlay}']
    begun = begin_background(scene, domain, 's1', *more)
    in_guest(domain, 'dd if=/dev/urandom of=/dev/vdc bs=1M count=1 '
             'conv=fsync 2>/dev/null')
    kill_qemu(domain, begun)
    domain.daemon.full_speed()
    wait_until('it is shut off', lambda: domain.state() == 'shut off')
    expect('disks', domain.sources(), [*domain.disks, overlay])
    if file.read_bytes() != whole:
        raise AssertionError(f'{file} was written to')
    domain.boot()
    domain.daemon.virsh(*arguments(scene, 's2', '--diskspec',
                                   'vdc,snapshot=external,file='
                                   f'{scene.files}/vdc.s2'))
    revert(domain, 's2')


def volumes(scene: Scene) -> None:
    """Disks that are files, but named by their pool."""
    domain = start(scene, **HOLDABLE)
    domain.close()
    domain.daemon.start_storage()
    domain.daemon.virsh('pool-create-as', 'lab', 'dir', '--target',
                        scene.files)
    xml = scene.logs / 'volumes.xml'
    xml.write_text(re.sub(
        f"(<disk type=)'file'(.*?<source )file='{scene.files}/(.*?)'",
        r"\1'volume'\2pool='lab' volume='\3'",
        domain.virsh('dumpxml', '--inactive'), flags=re.S))
    domain.daemon.virsh('define', xml)
    domain.boot()
    # Who has started the domain says more of it.
    domain.daemon.restart(**HOLDABLE)
    before = Before(scene, domain)
    begun = begin_background(scene, domain, 's1')
    domain.virsh('domjobabort')
    refused('s1', ABORTED, lambda: begun.finish(ABORT_S), VirshError)
    before.expect()
    domain.prove()

    domain.daemon.full_speed()
    begun = begin_background(scene, domain, 's1')
    write_marker(domain)
    kill_daemon(domain, begun)
    domain.daemon.start(**HOLDABLE)
    before.expect(within=UNDO_S)
    domain.prove()

    domain.daemon.full_speed()
    begun = begin_background(scene, domain, 's1')
    kill_qemu(domain, begun)
    before.expect_shut_off()
    expect_marker(domain.disks[1])
    domain.daemon.full_speed()
    domain.boot()
    # libvirt does not revert to snapshots of these.
    domain.daemon.virsh(*arguments(scene, 's1'))
    domain.prove()


def panicked(scene: Scene) -> None:
    """What is to be done about the guest is done when it has ended."""
    domain = start(scene, **HOLDABLE)
    domain.close()
    xml = scene.logs / 'panic.xml'
    xml.write_text(domain.virsh('dumpxml', '--inactive').replace(
        '<devices>', "<devices><panic model='isa'/>"))
    domain.daemon.virsh('define', xml)
    domain.boot()
    begun = begin_background(scene, domain, 's1')
    # As the driver of the device does it.
    domain.console.run("printf '\\001' | dd of=/dev/port bs=1 count=1 "
                       'seek=1285 2>/dev/null')
    wait_until('it stands still', lambda: domain.state() != 'running')
    # Half a minute is as long as one waits for a job.
    time.sleep(35)
    domain.daemon.full_speed()
    begun.finish()
    wait_until('it is destroyed', lambda: domain.state() == 'shut off')
    revert(domain, 's1')


CASES = [
    Case(f'libvirt-{name}', run, libvirt=True) for name, run in (
        ('undo-retried', undo_retried), ('undo-overtaken', undo_overtaken),
        ('undo-by-hand', undo_by_hand), ('undo-copied', undo_copied),
        ('undo-saved', undo_saved),
        ('undo-terminated', partial(undo_terminated, end_by_signal)),
        ('undo-destroyed', partial(undo_terminated, end_by_virsh)),
        ('powered-off-unseen', powered_off_unseen),
        ('part-of-file', part_of_file), ('volumes', volumes),
        ('panicked', panicked),
    )]
