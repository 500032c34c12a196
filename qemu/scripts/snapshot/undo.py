# SPDX-License-Identifier: GPL-2.0-or-later

"""
Takes an unfinished snapshot back, from what its journal says.  "create" does
so when it fails, and "delete --partial" when "create" was killed.  It is all
done from the journal, so that both are the same.
"""

import os
from functools import partial
from typing import Any, Callable, Dict, List, Optional

from . import blockjobs, disks, migration, store
from .errors import SnapshotError
from .images import QemuImg, check_no_internal
from .progress import Progress
from .vm import MonitorLost, VM, started


Json = Dict[str, Any]

# In what we may have left the VM; io-error: if we have filled its disk
STOPPED = ('paused', 'prelaunch', 'postmigrate', 'finish-migrate')


def changed_since(disk: Json) -> bool:
    """Whether somebody has written to a disk that has an overlay."""
    known = disk.get('state')
    now = store.file_state(disk['file'])
    # What QEMU itself had still to write is older than the overlay
    return bool(known and known != now and now['mtime-ns']
                > os.stat(disk['overlay']).st_mtime_ns)


def runs(journal: Json) -> bool:
    """Whether the VM of a journal is known to run."""
    vm = journal['vm']
    return vm['started'] is not None and started(vm['pid']) == vm['started']


class Undo:
    """Undoes all that it can, and keeps a list of what it cannot."""

    def __init__(self, place: store.Snapshot, journal: Json,
                 vm: Optional[VM], image_tool: QemuImg, progress: Progress):
        self.place = place
        self.journal = journal
        self.vm = vm
        self.image_tool = image_tool
        self.progress = progress
        # A VM that was started anew has but the overlays
        self.same = vm is not None and vm.identity() == journal['vm']
        self.todo: List[str] = []

    def run(self) -> List[str]:
        """Do it; returns what is left to do by hand."""
        if self.vm is not None and not self._find_vm():
            return self.todo
        if self.vm is not None and self.same:
            if self.journal.get('migrating'):
                self._try('the migration: migrate_cancel', self._cancel)
        # It may be what has filled the file system that the disks are on
        self._try(f'image: remove {self.place.partial}', self._remove_image)
        if self.vm is not None and self.same:
            # First of all the guest goes on, the rest can wait
            if self.journal.get('was-running'):
                self._try('the VM is paused: cont', self._resume)
        for disk in self.journal.get('disks', []):
            self._try(f'disk {disk["id"]}: {self._by_hand(disk)}',
                      partial(self._disk, disk))
        if self.vm is not None and self.same:
            self._try('capabilities and parameters of the migration: '
                      'migrate-set-capabilities, migrate-set-parameters',
                      self._settings)
        # What is left of it is needed to try again
        if not self.todo:
            self._try(f'files: remove {self.place.partial}',
                      self.place.abandon)
        return self.todo

    def _try(self, what: str, action: Callable[[], None]) -> None:
        self.progress.step(f'undo: {what.partition(":")[0]}')
        try:
            action()
        except MonitorLost as problem:
            # It was there when we began; a second time there is no way on
            self.todo.append(f'{what} ({problem})')
        except (SnapshotError, OSError) as problem:
            self.todo.append(f'{what} ({problem})')

    def _find_vm(self) -> bool:
        """See what has become of the VM: it answers, or has ended."""
        assert self.vm is not None
        try:
            self.vm.status()
            return True
        except MonitorLost:
            pass
        if self.vm.wait_gone(0):
            self.vm = None
            return True
        if self.vm.reconnect():
            return True
        self.todo.append(f'QEMU does not answer at {self.vm.address}: when it '
                         'does, or has ended, "delete --partial" undoes '
                         f'{self.place.partial}')
        return False

    def _cancel(self) -> None:
        assert self.vm is not None
        migration.cancel(self.vm)

    def _remove_image(self) -> None:
        image = os.path.join(self.place.partial, store.IMAGE)
        if os.path.exists(image):
            os.unlink(image)

    def _resume(self) -> None:
        assert self.vm is not None
        status = self.vm.status()
        # Once it was resumed, it is not us who have paused it
        if status == 'io-error' or self.journal.get('paused') and \
                status in STOPPED:
            self.vm.cmd('cont')

    def _settings(self) -> None:
        assert self.vm is not None
        before = self.journal['settings']
        if migration.settings(self.vm, before['capabilities'],
                              before['parameters']) != before:
            migration.apply(self.vm, before)

    def _by_hand(self, disk: Json) -> str:
        if self.journal['mode'] == 'internal':
            return (f'delete internal snapshot {self.place.name} of '
                    f'{disk["file"]}')
        return f'merge {disk["overlay"]} into {disk["file"]}'

    def _disk(self, disk: Json) -> None:
        if self.journal['mode'] == 'internal':
            self._internal(disk)
        elif self.journal['mode'] == 'external':
            self._external(disk)

    def _internal(self, disk: Json) -> None:
        name = self.place.name
        if self.vm is not None:
            node = disks.has_internal(self.vm, disk, name)
            if node is not None:
                disks.delete_internal(self.vm, node, name)
        elif self.journal.get('snapshotting'):
            info = self.image_tool.info(disk['file'])
            if name in [s['name'] for s in info.get('snapshots', [])]:
                self.image_tool.delete_internal(disk['file'], name)

    def _external(self, disk: Json) -> None:
        overlay = disk['overlay']
        if not os.path.exists(overlay):
            return
        if self.vm is not None:
            if blockjobs.root_of(self.vm, overlay) is not None:
                check_no_internal(overlay)
                blockjobs.merge(self.vm, overlay, disk['file'],
                                partial(self._completing, disk))
            elif not self.same and not disk.get('completing'):
                raise SnapshotError('that VM does not use it')
        elif self.journal.get('snapshotting'):
            # The VM has ended.  What it has written is in the overlay.
            if disk.get('completing') or changed_since(disk):
                raise SnapshotError(f'{disk["file"]} may have been written to '
                                    'since: one of both is of no use now')
            check_no_internal(overlay)
            self.image_tool.commit(overlay)
        os.unlink(overlay)

    def _completing(self, disk: Json) -> None:
        """From now on it may be the VM's disk that is written to."""
        disk['completing'] = True
        self.place.note(self.journal)
