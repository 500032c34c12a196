# SPDX-License-Identifier: GPL-2.0-or-later

"""
Takes an unfinished snapshot back, from what its journal says.  "create" does
so when it fails, and "delete --partial" when "create" was killed.  It is all
done from the journal, so that both are the same.
"""

import contextlib
import os
from functools import partial
from typing import Any, Callable, Dict, List, Optional

from . import blockjobs, disks, migration, records, store
from .errors import SnapshotError
from .images import QemuImg, base_of
from .merging import Merging
from .progress import Progress
from .vm import MonitorLost, VM


Json = Dict[str, Any]

# In what we may have left the VM; io-error: if we have filled its disk
STOPPED = ('paused', 'prelaunch', 'postmigrate', 'finish-migrate')


def changed_since(disk: Json) -> bool:
    """Whether somebody may have written to a disk that has an overlay."""
    now = store.file_state(disk['file'])
    if not now:
        return True  # A host device does not tell
    if 'state' in disk:
        return bool(disk['state'] != now)
    # "create" was killed before it could look at it
    return bool(now['mtime-ns'] > os.stat(disk['overlay']).st_mtime_ns)


class Undo:
    """Undoes all that it can, and keeps a list of what it cannot."""

    def __init__(self, place: store.Snapshot, journal: Json,
                 vm: Optional[VM], image_tool: QemuImg, progress: Progress,
                 forget: bool = False):
        """@forget: leave the disks as they are."""
        self.place = place
        self.journal = journal
        self.vm = vm
        self.image_tool = image_tool
        self.progress = progress
        # A VM that was started anew has but the overlays
        self.same = False
        self.forget = forget
        self.merging: Optional[Merging] = None
        self.todo: List[str] = []

    def run(self) -> List[str]:
        """Do it; returns what is left to do by hand."""
        mark = self.journal['mark']
        if self.vm is not None and not self._find_vm(mark):
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
        if self.vm is not None:
            self._try('jobs: end those that are left',
                      partial(blockjobs.tidy, self.vm))
        if self.journal['disks']:
            self._disks()
        if self.vm is not None and self.same:
            self._try('capabilities and parameters of the migration: '
                      'migrate-set-capabilities, migrate-set-parameters',
                      self._settings)
        # What is left of it is needed to try again
        if not self.todo:
            if self.merging is not None:
                self.merging.end()
            self._try(f'files: remove {self.place.partial}',
                      self.place.abandon)
        if not self.todo and self.vm is not None:
            with contextlib.suppress(SnapshotError):
                self.vm.unmark(mark)
        return self.todo

    def _try(self, what: str, action: Callable[[], None]) -> None:
        self.progress.step(f'undo: {what.partition(":")[0]}')
        try:
            action()
        # The rest is to be tried also after a bug of ours
        except Exception as problem:  # pylint: disable=broad-except
            self.todo.append(f'{what} ({problem})')

    def _find_vm(self, mark: str) -> bool:
        """See what has become of the VM: it answers, or has ended."""
        assert self.vm is not None
        try:
            self.same = self.vm.has_mark(mark)
            if self.same and self.vm.cwd is None:
                self.vm.cwd = self.journal['vm']['cwd']
            return True
        except MonitorLost:
            pass
        if self.vm.wait_gone(0):
            self.vm = None
            return True
        if self.vm.reconnect(mark):
            self.same = True
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

    def _disks(self) -> None:
        undo_one = self._internal
        if self.journal['mode'] == 'external':
            undo_one = self._external
            self._try('disks: find out who uses them', self._look)
            if self.merging is None:
                return
        if self.forget:
            if self.merging is not None:
                self._try('snapshots taken later: tell them what their disks '
                          'are', self.merging.forget)
            return
        for disk in self.journal['disks']:
            self._try(f'disk {disk["id"]}: {self._by_hand(disk)}',
                      partial(undo_one, disk))

    def _look(self) -> None:
        merging = Merging(self.place, self.place.partial,
                          self.journal['disks'],
                          store.neighbours(self.place, skip_damaged=True),
                          self.vm, self.image_tool, self.progress)
        merging.tidy()
        merging.begin(self.journal['mark'])
        self.merging = merging

    def _internal(self, disk: Json) -> None:
        name = self.place.name
        if not self.journal.get('snapshotting'):
            return
        if self.vm is not None:
            disks.delete_internal(self.vm, disk, name)
            return
        self.image_tool.probe(disk['file'])
        self.image_tool.delete_internal(disk['file'], name)

    def _external(self, disk: Json) -> None:
        overlay = disk['overlay']
        merging = self.merging
        assert merging is not None
        used = merging.used(overlay)
        if not used and not self._is_ours(disk):
            records.replace(records.beside(disk['file']), overlay, None)
            return
        if merging.merged(disk) or not used and self._is_empty(disk) and \
                not merging.children(overlay):
            merging.settle(disk, self.same)
            return
        if self.vm is None:
            # It has ended.  What it has written is in the overlay.
            merging.probe(overlay)
        if not used and (self.vm is not None or merging.noted(disk) is None
                         and changed_since(disk)):
            raise SnapshotError(
                f'{disk["file"]} may have been written to since.  If the VM '
                f'was last started on {overlay}, start it on that again, and '
                'give --qmp; otherwise call this with --forget, and remove '
                f'{overlay}')
        above = merging.check(disk, is_new=True)
        merging.merge(disk, above)
        merging.settle(disk)

    def _is_ours(self, disk: Json) -> bool:
        """Whether there is the overlay that was created, and no other."""
        assert self.merging is not None
        overlay = disk['overlay']
        if 'inode' not in disk:
            # "create" may have been killed before it could look
            if 'begun' in disk and os.path.exists(overlay) and \
                    not os.path.getsize(overlay):
                os.unlink(overlay)
            return False
        if self.merging.gone(disk):
            return False
        if os.stat(overlay).st_ino == disk['inode']:
            return True
        base = base_of(overlay)
        if base is not None and blockjobs.same_file(base, disk['file']):
            raise SnapshotError(
                f'{overlay} is not the file that it was: if it is a copy of '
                'that, "qemu-img commit" it and remove it, then call this '
                'with --forget')
        return False

    def _is_empty(self, disk: Json) -> bool:
        """Whether nobody has ever written to the overlay."""
        if 'empty' not in disk:
            # It may be there, and have been found, nevertheless
            return self.same or self.image_tool.is_empty(disk['overlay'])
        return bool(disk['empty'] == store.file_state(disk['overlay']))
