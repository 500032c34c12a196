"""Devices, disks and block jobs that come and go during a snapshot.

SPDX-License-Identifier: GPL-2.0-or-later
"""
from .. import disk, snapshot
from ..hardware import Hardware
from ..scene import Case, Scene
from ..steps import (begin_held, expect_active, finish, refused, still_clean,
                     wait_until)
from ..vm import VM
from ..workload import SelfCheck

EVENT_S = 60
# A network card's ROM is RAM to QEMU, a block of its own.
CARD = {'driver': 'virtio-net-pci', 'id': 'card', 'bus': 'port1'}
RNG = {'driver': 'virtio-rng-pci', 'id': 'rng', 'bus': 'port2'}
ADDED_MB = 16
BUFFER_MB = 96


def hardware(scene: Scene) -> Hardware:
    """With devices that can be taken out, and a free port."""
    return Hardware(vcpus=2, disk=scene.new_disk(), devices=(
        *(f'pcie-root-port,id=port{n},chassis={n}' for n in (1, 2, 3)),
        *(','.join([d['driver'], f'id={d["id"]}', f'bus={d["bus"]}'])
          for d in (CARD, RNG))))


def wait_event(vm: VM, mark: int, name: str, **data: str) -> None:
    vm.qmp.wait_event(mark, f'{name} {data}', lambda e: e['event'] == name and
                      data.items() <= e['data'].items(), EVENT_S)


def add_node(scene: Scene, vm: VM, name: str, mb: int) -> None:
    """Give QEMU a new image that no device uses."""
    vm.qmp.cmd('blockdev-add', driver='qcow2', node_name=name, file={
        'driver': 'file', 'filename': str(disk.new(
            scene.place, scene.files / f'{name}.qcow2', mb))})


def remove(vm: VM, device: str) -> None:
    mark = vm.qmp.mark()
    vm.qmp.cmd('device_del', id=device)
    wait_event(vm, mark, 'DEVICE_DELETED', device=device)


def devices(scene: Scene) -> None:
    """They come and go after the snapshot; what is behind them, at once."""
    vm = scene.boot(hardware(scene))
    begun = begin_held(scene, vm)
    add_node(scene, vm, 'added', ADDED_MB)
    vm.qmp.cmd('netdev_add', type='user', id='net')
    added = {'driver': 'virtio-blk-pci', 'id': 'vdb', 'drive': 'added',
             'bus': 'port3'}
    for device in (added, {**RNG, 'id': 'more', 'bus': 'port3'},
                   {**CARD, 'id': 'more', 'bus': 'port3', 'netdev': 'net'}):
        refused(device['driver'], 'device_add not allowed while migrating',
                lambda d=device: vm.qmp.cmd('device_add', **d))
    refused('removing one', 'device_del not allowed while migrating',
            lambda: vm.qmp.cmd('device_del', id=CARD['id']))
    vm.qmp.cmd('netdev_del', id='net')
    still_clean(scene, vm)
    expect_active(vm, 'devices were refused')
    finish(scene, vm, begun)

    vm.qmp.cmd('cont')
    vm.qmp.cmd('device_add', **added)
    since = vm.console.mark()
    vm.console.run('until [ -b /dev/vdb ]; do sleep 0.2; done; '
                   'cat /dev/vdb | wc -c')
    vm.console.wait(f'^{ADDED_MB << 20}$', since, EVENT_S)
    for device in (added['id'], CARD['id']):
        remove(vm, device)
    vm.qmp.cmd('blockdev-del', node_name='added')
    vm.qmp.cmd('device_add', **CARD)
    scene.round_trip(vm)


def ejected(scene: Scene) -> None:
    """A guest that was asked to give up devices before does so meanwhile.

    One whose RAM is to be in the image is kept for it until the end: here it is
    not in the buffer, which has room for what the guest writes, and no more.
    """
    scene.check = SelfCheck(write_mb=16, static_mb=150)
    vm = scene.boot(hardware(scene))
    mark = vm.qmp.mark()
    vm.qmp.cmd('stop')
    for device in (CARD, RNG):
        vm.qmp.cmd('device_del', id=device['id'])
    begun = begin_held(scene, vm, BUFFER_MB)
    wait_until('they are gone', lambda: {CARD['id'], RNG['id']}.isdisjoint(
        child['name'] for child in
        vm.qmp.cmd('qom-list', path='/machine/peripheral')), EVENT_S)
    wait_event(vm, mark, 'DEVICE_DELETED', device=RNG['id'])
    still_clean(scene, vm)
    expect_active(vm, 'devices are gone')
    finish(scene, vm, begun)
    wait_event(vm, mark, 'DEVICE_DELETED', device=CARD['id'])

    vm.qmp.cmd('cont')
    for device in (CARD, RNG):
        vm.qmp.cmd('device_add', **device)
    scene.round_trip(vm)


def node(vm: VM) -> str:
    """What the guest's disk is written to."""
    return snapshot.inserted(vm)['node-name']


def complete(vm: VM, job: str) -> None:
    """Wait until @job has caught up with the guest; have it take over."""
    wait_event(vm, 0, 'BLOCK_JOB_READY', device=job)
    vm.qmp.cmd('job-complete', id=job)
    wait_event(vm, 0, 'BLOCK_JOB_COMPLETED', device=job)


def block_jobs(scene: Scene) -> None:
    """The disk gets overlays, is merged and moved; its snapshot stays."""
    vm = scene.boot(Hardware(vcpus=2, disk=scene.new_disk()))
    begun = begin_held(scene, vm)
    base = node(vm)
    vm.qmp.cmd('blockdev-snapshot-sync', node_name=base, format='qcow2',
               snapshot_file=str(scene.files / 'above.qcow2'),
               snapshot_node_name='above')
    scene.disk_check.prove(vm)
    answer = vm.qmp.cmd('human-monitor-command', command_line='savevm late')
    if 'migration process in progress' not in answer:
        raise AssertionError(f'savevm: {answer}')
    refused('removing one in use', 'in use', lambda:
            vm.qmp.cmd('blockdev-del', node_name='above'))
    vm.qmp.cmd('block-commit', job_id='commit', device='above',
               base_node=base)
    complete(vm, 'commit')
    wait_until('the overlay is gone', lambda: node(vm) == base)

    add_node(scene, vm, 'moved', scene.disk_check.disk_mb)
    vm.qmp.cmd('blockdev-mirror', job_id='mirror', device=base,
               target='moved', sync='full')
    complete(vm, 'mirror')
    wait_until('the disk has moved', lambda: node(vm) == 'moved')
    still_clean(scene, vm)
    expect_active(vm, 'the disk has moved')
    finish(scene, vm, begun)

    vm.qmp.cmd('cont')
    scene.round_trip(vm)


CASES = [
    Case('hotplug-devices', devices),
    Case('hotplug-ejected', ejected),
    Case('hotplug-block-jobs', block_jobs),
]
