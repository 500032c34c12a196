"""What is done to a domain, or by its guest, while libvirt snapshots it.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import subprocess
import time
from pathlib import Path

from ..domain import TARGETS
from ..domain_steps import (ABORT_S, ABORTED, HOLDABLE, Before, arguments,
                            begin_background, begin_early, begin_held, good,
                            power_off, revert, start)
from ..host import Skip, needs_root
from ..libvirt import VirshError
from ..scene import Case, Scene
from ..steps import expect, refused
from ..vm import BOOT_S

# Seconds after it is noted: before the snapshot's moment and after it.
MOMENTS = [0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7]
ROUNDS = 20
DEVICE_MB = 128


def aborted(scene: Scene) -> None:
    """At any moment, once there is something to abort."""
    domain = start(scene, **HOLDABLE)
    before = Before(scene, domain)
    for moment in MOMENTS:
        begun = begin_early(scene, domain, 's1')
        time.sleep(moment)
        domain.virsh('domjobabort')
        refused(f'after {moment:.2f} s', ABORTED,
                lambda begun=begun: begun.finish(ABORT_S), VirshError)
        domain.assert_alive()
        before.expect()
    domain.prove()
    good(scene, domain, 's1')


def powered_off(scene: Scene) -> None:
    """The guest does that to itself."""
    domain = start(scene, **HOLDABLE)
    before = Before(scene, domain)
    begun = begin_background(scene, domain, 's1')
    power_off(domain)
    refused('s1', '', lambda: begun.finish(ABORT_S), VirshError)
    domain.daemon.full_speed()
    before.expect_shut_off()
    domain.boot()
    good(scene, domain, 's1')


def rebooted(scene: Scene) -> None:
    """By a power-off that libvirt was told to make a reboot."""
    domain = start(scene, **HOLDABLE)
    # This guest does not listen to its power button.
    domain.virsh('reboot', '--mode', 'acpi')
    begun = begin_background(scene, domain, 's1')
    mark = domain.console.mark()
    power_off(domain)
    domain.console.wait('guest ready', mark, BOOT_S)
    if not begun.goes_on():
        raise AssertionError(f'it has ended: {begun.finish()}')
    domain.daemon.full_speed()
    begun.finish()
    domain.assert_alive()
    revert(domain, 's1')


def redefined(scene: Scene) -> None:
    """With the disks that it had; the snapshot fails."""
    domain = start(scene, **HOLDABLE)
    xml = scene.logs / 'new.xml'
    xml.write_text(domain.virsh('dumpxml', '--inactive').replace(
        '</name>', '</name><title>new</title>'))
    begun = begin_background(scene, domain, 's1')
    domain.daemon.virsh('define', xml)
    domain.virsh('domjobabort')
    refused('s1', ABORTED, lambda: begun.finish(ABORT_S), VirshError)
    for which in ([], ['--inactive']):
        expect('disks', domain.sources(*which), domain.disks)
    expect('title', domain.virsh('desc', '--config', '--title'), 'new')
    domain.prove()
    good(scene, domain, 's1')


def block_devices(scene: Scene) -> None:
    """Overlays on devices, which are not removed."""
    needs_root('block devices')
    domain = start(scene, **HOLDABLE)
    devices, specs = [], []
    for target in TARGETS:
        file = scene.logs / f'{target}.device'
        with file.open('wb') as device:
            device.truncate(DEVICE_MB << 20)
        scene.callback(file.unlink)
        made = subprocess.run(['losetup', '--find', '--show', file],
                              check=False, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
        if made.returncode:
            raise Skip(f'no loop devices: {made.stdout.strip()}')
        devices.append(Path(made.stdout.strip()))
        scene.callback(subprocess.run, ['losetup', '--detach', devices[-1]])
        specs += ['--diskspec', f'{target},snapshot=external,stype=block,'
                  f'file={devices[-1]}']
    domain.daemon.give(*devices)
    before = Before(scene, domain)
    begun = begin_held(scene, domain, 's1', *specs)
    domain.virsh('domjobabort')
    refused('s1', ABORTED, lambda: begun.finish(ABORT_S), VirshError)
    before.expect()
    expect('block devices', [d.is_block_device() for d in devices],
           [True, True])
    domain.prove()
    domain.daemon.full_speed()
    domain.daemon.virsh(*arguments(scene, 's1', *specs))
    revert(domain, 's1')


def disk_as_overlay(scene: Scene) -> None:
    """What is in use is no overlay: to undo that would merge it."""
    domain = start(scene)
    domain.daemon.virsh(*arguments(scene, 's1'))
    before = Before(scene, domain)
    for what, path in (('disk', domain.sources()[0]),
                       ('backing file', domain.disks[0])):
        refused(f'the {what} itself', 'in use', lambda path=path:
                domain.daemon.virsh(*arguments(
                    scene, 's2', '--reuse-external', '--diskspec',
                    f'vda,snapshot=external,file={path}', '--diskspec',
                    'vdb,snapshot=no')), VirshError)
        before.expect()
    domain.prove()
    revert(domain, 's1')


def rounds(scene: Scene) -> None:
    """Again and again; the guest is clean each time, before and after."""
    domain = start(scene)
    for number in range(ROUNDS):
        domain.daemon.virsh(*arguments(scene, f's{number}'))
        domain.prove()
        revert(domain, f's{number}')
        domain.virsh('snapshot-delete', f's{number}')
    scene.note(f'{ROUNDS} snapshots')


CASES = [
    Case('libvirt-aborted', aborted, libvirt=True),
    Case('libvirt-powered-off', powered_off, libvirt=True),
    Case('libvirt-rebooted', rebooted, libvirt=True),
    Case('libvirt-redefined', redefined, libvirt=True),
    Case('libvirt-block-devices', block_devices, libvirt=True),
    Case('libvirt-disk-as-overlay', disk_as_overlay, libvirt=True),
    Case('libvirt-rounds', rounds, libvirt=True, extra=True),
]
