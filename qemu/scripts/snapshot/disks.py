# SPDX-License-Identifier: GPL-2.0-or-later

"""
The VM's disks: which there are, whether they can be snapshotted, and doing
it, all at one moment.
"""

import contextlib
import os
from typing import Any, Callable, Dict, List, Optional

from . import blockjobs, rights, store
from .errors import Refused, SnapshotError
from .vm import VM


Json = Dict[str, Any]

MODES = ('external', 'internal', 'none')
FORMATS = ('raw', 'qcow2')


def _label(device: Json, node: str) -> str:
    """What a user calls a disk."""
    if device.get('device') or node.startswith('#'):
        return str(device.get('device') or device.get('qdev') or node)
    return node


def _is_part(filename: str) -> bool:
    """Whether an image is only a part of its file, by what QEMU says."""
    trees = [blockjobs.tree_of(filename)]
    while trees:
        tree = trees.pop()
        if 'offset' in tree or 'size' in tree:
            return True
        trees += [value for value in tree.values() if isinstance(value, dict)]
    return False


def writable(vm: VM) -> List[Json]:
    """The disks that the VM can write to, as they stand in a manifest."""
    disks: Dict[str, Json] = {}
    for device in vm.cmd('query-block'):
        inserted = device.get('inserted')
        if not inserted or inserted['ro']:
            continue
        node, image = inserted['node-name'], inserted['image']
        disks.setdefault(node, {
            'id': _label(device, node),
            'node': node,
            'format': inserted['drv'],
            'file': blockjobs.path_of(vm, image['filename']),
            'chain': blockjobs.chain(vm, image),
            'part': _is_part(image['filename']),
            'virtual-size': image['virtual-size'],
            'encrypted': (image.get('encrypted', False)
                          or inserted.get('encrypted', False)),
            'snapshots': [s['name'] for s in image.get('snapshots', [])],
        })
    return list(disks.values())


def check(disks: List[Json], mode: str) -> None:
    """Refuse what cannot be snapshotted in this mode."""
    for disk in disks:
        name = f'disk {disk["id"]} ({disk["file"]})'
        if disk['format'] not in FORMATS:
            raise Refused(f'{name} has the driver {disk["format"]}: only '
                          f'{" and ".join(FORMATS)} can be snapshotted here; '
                          'do it by other means, and use --disks none')
        if not os.path.isabs(disk['file']):
            raise Refused(f'{name} has a relative name, and nobody tells from '
                          'where: give a unix socket, and see the VM\'s '
                          'process in /proc')
        if not os.path.exists(disk['file']):
            raise Refused(f'{name} is no file or device of this host: '
                          'snapshot it by other means, and use --disks none')
        if disk['part']:
            raise Refused(f'{name} is only a part of its file: snapshot it by '
                          'other means, and use --disks none')
        if mode == 'external' and disk['encrypted']:
            raise Refused(f'{name} is encrypted, its overlay would not be: '
                          'snapshot it by other means, and use --disks none')
        if mode == 'internal' and disk['format'] != 'qcow2':
            raise Refused(f'{name} has the format {disk["format"]}: there are '
                          'internal snapshots in qcow2 only')


def place_overlays(disks: List[Json], name: str,
                   directory: Optional[str]) -> None:
    """Decide which file each disk will be written to."""
    taken = set()
    for disk in disks:
        bottom = disk['chain'][-1]
        folder = os.path.abspath(directory or os.path.dirname(disk['file']))
        stem = os.path.splitext(os.path.basename(bottom))[0]
        path = os.path.join(folder, f'{stem}.{name}.qcow2')
        number = 1
        while path in taken:
            number += 1
            path = os.path.join(folder, f'{stem}-{number}.{name}.qcow2')
        taken.add(path)
        if os.path.lexists(path):
            raise Refused(f'{path} exists already')
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
            raise Refused(f'cannot write to {folder}; --overlay-dir names '
                          'another place for the overlays')
        if store.in_dev(folder):
            raise Refused(f'disk {disk["id"]} is the device {disk["file"]}: '
                          '--overlay-dir must tell where its overlay goes')
        disk['overlay'] = path


def check_idle(vm: VM) -> None:
    """Refuse while block jobs run: they would not like it."""
    busy = [job['id'] for job in vm.cmd('query-jobs')
            if job['status'] not in ('concluded', 'null')
            or job['id'].startswith('snap-commit-')]
    if busy:
        raise Refused(f'the VM has jobs that run: {", ".join(busy)}'
                      + ('; a "delete" was killed: call it again, or, if '
                         'there is no such snapshot any more, cancel it with '
                         'block-job-cancel'
                         if busy[0].startswith('snap-commit-') else ''))


def prepare(vm: VM, disk: Json, note: Callable[[], None]) -> None:
    """Create a disk's overlay while the VM still runs.

    Has it noted, in @disk, which file it is, and what it is as long as it is
    empty.
    """
    path = disk['overlay']
    _make_file(vm, disk, note)
    blockjobs.create_overlay(vm, path, disk['virtual-size'],
                             disk['file'], disk['format'])
    # It may be QEMU's, and QEMU somebody else
    with contextlib.suppress(PermissionError), rights.acting_as(vm.user()):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            store.like(fd, disk['file'])
        finally:
            os.close(fd)
    disk['empty'] = store.file_state(path)
    note()


def _make_file(vm: VM, disk: Json, note: Callable[[], None]) -> None:
    """Create the empty file of a disk's overlay.

    Not by QEMU, which would empty one that is there by now, such as that of
    another VM's snapshot.
    """
    path = disk['overlay']
    # What is there before is nothing that is ours to undo
    disk['begun'] = True
    note()
    try:
        # QEMU has said where it goes: only where QEMU itself may write
        with rights.acting_as(vm.user()):
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        del disk['begun']
        note()
        raise SnapshotError(f'{path} is there by now, and is not ours'
                            ) from None
    try:
        disk['inode'] = os.fstat(fd).st_ino
    finally:
        os.close(fd)
    note()
    try:
        blockjobs.create_file(vm, path)
    except SnapshotError:
        # QEMU may be somebody to whom our file is closed, but not the folder
        del disk['inode']
        note()
        with rights.acting_as(vm.user()):
            os.unlink(path)
        blockjobs.create_file(vm, path)
        disk['inode'] = os.lstat(path).st_ino
        note()


def check_overlays(disks: List[Json]) -> None:
    """Raise if an overlay is not what it was when it was created."""
    for disk in disks:
        path = disk['overlay']
        if os.lstat(path).st_ino != disk['inode'] or \
                store.file_state(path) != disk['empty']:
            raise SnapshotError(f'somebody has changed {path}, which is ours')


def snapshot(vm: VM, disks: List[Json], mode: str, name: str) -> None:
    """Snapshot all disks or none, of a VM that is paused."""
    if mode == 'external':
        check_overlays(disks)
        actions = [{'type': 'blockdev-snapshot-sync', 'data': {
            'node-name': disk['node'], 'snapshot-file': disk['overlay'],
            'snapshot-node-name': blockjobs.unique('disk'),
            'format': 'qcow2', 'mode': 'existing'}} for disk in disks]
    else:
        actions = [{'type': 'blockdev-snapshot-internal-sync', 'data': {
            'device': disk['node'], 'name': name}} for disk in disks]
    if actions:
        vm.cmd('transaction', actions=actions)


def delete_internal(vm: VM, disk: Json, name: str) -> None:
    """Delete an internal snapshot, if there is one of this name.

    Raises if the VM does not use the disk.
    """
    root = blockjobs.root_of(vm, disk['file'])
    for found in writable(vm):
        if found['node'] == root:
            if name in found['snapshots']:
                vm.cmd('blockdev-snapshot-delete-internal-sync', device=root,
                       name=name)
            return
    raise SnapshotError(f'the VM at {vm.address} does not write to '
                        f'{disk["file"]}')
