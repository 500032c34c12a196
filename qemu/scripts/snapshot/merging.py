# SPDX-License-Identifier: GPL-2.0-or-later

"""
Merges overlays into the disks that they are on, of a VM that runs or is off,
for "delete" and for whoever undoes a "create".

Both may be killed at any place, and are then called again.  Meanwhile the VM
may have ended, and have been started on the overlay or on the disk.  So it is
noted how far each overlay is: a stale one must not be written into a newer
disk, and one that somebody uses, or that has what is nowhere else, must not
be removed.  Where it cannot be told which of both is right, the user is asked.
"""

import contextlib
import os
from typing import Any, Callable, Dict, List, Optional, Tuple

from . import blockjobs, store
from .errors import SnapshotError
from .images import QemuImg, base_of, check_no_internal
from .progress import Progress
from .vm import VM, new_mark


Json = Dict[str, Any]

RESTORED = 'restored.json'
# More than a second, in which the notes are renewed, and than clocks differ
LATER_S = 5
FORGET = 'or call it with --forget, which leaves all disks as they are'


class Merging:
    """Overlays ("layers") of one snapshot, and notes of how far each is."""

    def __init__(self, place: store.Snapshot, folder: str,
                 layers: List[Json], others: List[Tuple[str, Json]],
                 vm: Optional[VM], image_tool: QemuImg, progress: Progress):
        """@folder: where the notes are, and end with the snapshot.

        @others: from store.neighbours().
        """
        self.vm = vm
        self.image_tool = image_tool
        self.progress = progress
        self._place = place
        self._layers = layers
        self.others = others
        self._now: List[str] = []
        self._mark: Optional[str] = None
        self._path = os.path.join(folder, store.NOTES)
        self._notes: Json = (store.read_json(self._path)
                             if os.path.exists(self._path) else {})

    # Notes

    def begin(self, mark: Optional[str] = None) -> None:
        """Have the notes know this run of the VM again, by @mark if it has it.

        The notes may be for a VM that has ended since.
        """
        if self.vm is None:
            return
        for known in [mark, *(note.get('vm')
                              for note in self._notes.values())]:
            if known is not None and self.vm.has_mark(known):
                self._mark = known
                return
        self._mark = new_mark()
        self.vm.mark(self._mark)

    def end(self) -> None:
        """All is merged, and nobody needs the notes any more."""
        if self.vm is not None and self._mark is not None:
            with contextlib.suppress(SnapshotError):
                self.vm.unmark(self._mark)

    def noted(self, layer: Json) -> Optional[str]:
        """'begun', 'completing' (by QEMU), 'merged', or None."""
        note = self._notes.get(layer['overlay'])
        return str(note['state']) if note is not None else None

    def _note(self, layer: Json, state: str, above: Optional[str]) -> None:
        self._notes[layer['overlay']] = {
            'state': state, 'above': above, 'vm': self._mark,
            'overlay': store.file_state(layer['overlay']),
            'disk': store.file_state(layer['file'])}
        store.write_json(self._path, self._notes)

    def _note_merged(self, layer: Json, above: Optional[str]) -> None:
        # All of it, before anything says that it is there
        for path in [layer['file'], *([above] if above is not None else [])]:
            store.sync(path)
        self._note(layer, 'merged', above)

    # Looking, without changing anything

    def gone(self, layer: Json) -> bool:
        """Whether an overlay is not there any more, as it should be."""
        overlay = layer['overlay']
        if os.path.lexists(overlay) or self.used(overlay):
            return False
        if self.noted(layer) in ('completing', 'merged'):
            return True
        raise SnapshotError(f'{overlay} cannot be seen: have it be there, '
                            + FORGET)

    def merged(self, layer: Json) -> bool:
        """Whether a layer is merged, and its overlay of no use any more.

        Raises if that cannot be told.
        """
        overlay, disk = layer['overlay'], layer['file']
        note = self._notes.get(overlay)
        if note is None:
            return False
        used = self.used(overlay)
        unwritten = note.get('overlay') == store.file_state(overlay)
        if self._is_below(layer, note['above']):
            # That was changed last of all
            if unwritten:
                return True
            raise self._unsure(layer, [])
        if note['state'] == 'begun' and not used and \
                self._written_later(layer):
            raise self._unsure(layer, [])
        if note['state'] == 'begun' and note['above'] is None:
            return False
        same = self._is_known_run(layer)
        if used and same and note['state'] == 'completing':
            return False  # QEMU has not done what it was told
        users = self.children(overlay)
        if users or used:
            # It has become somebody's disk since.  If the disk below is as it
            # was when that began, the overlay is right in any case.
            state = store.file_state(disk)
            if note['state'] == 'begun' or \
                    state and note.get('disk') == state:
                return False
            raise self._unsure(layer, users)
        if note['above'] is not None and note['state'] != 'merged':
            return False
        if not (unwritten if note['state'] == 'merged'
                else same and self.used(disk)):
            raise self._unsure(layer, [])
        return True

    def _is_known_run(self, layer: Json) -> bool:
        """Whether the VM is the one that its note is of."""
        note = self._notes.get(layer['overlay'], {})
        return self.vm is not None and self.vm.has_mark(note.get('vm'))

    def _written_later(self, layer: Json) -> bool:
        """Whether a disk was written to after we had ended, or the VM.

        While we are at work, the notes are as new as what is written; later
        the overlay is, to which the VM goes on to write.
        """
        disk = layer['file']
        return bool(store.file_state(disk)) and os.stat(disk).st_mtime > max(
            os.stat(path).st_mtime
            for path in (self._path, layer['overlay'])) + LATER_S

    def _unsure(self, layer: Json, users: List[str]) -> SnapshotError:
        overlay, disk = layer['overlay'], layer['file']
        what = (f'{disk} was to be used instead of {overlay}, and who knew '
                'how far that was has ended: ')
        if self.noted(layer) == 'begun':
            return SnapshotError(
                f'{what}if {overlay} has what the VM wrote last, start the VM '
                f'on that, and give --qmp; otherwise {FORGET[3:]}')
        if users or self.used(overlay):
            return SnapshotError(
                f'{what}it is not known whether {disk} or what is on '
                f'{overlay} has what the VM wrote last; find out, '
                + FORGET)
        return SnapshotError(
            f'{what}if the former has what the VM wrote last, remove the '
            'latter; otherwise "qemu-img commit" the latter before; then call '
            'this again')

    def check(self, layer: Json, is_new: bool = False) -> Optional[str]:
        """Raise if anybody needs what merging would change.

        @is_new: the VM wrote to the disk just before, so who else is on that
        has been of no use for longer.
        Returns the image whose base is the overlay, if there is one.
        """
        disk, overlay = layer['file'], layer['overlay']
        base = base_of(overlay)
        if base is None or not blockjobs.same_file(base, disk):
            raise SnapshotError(f'{overlay} is not an overlay of {disk}')
        check_no_internal(overlay)
        for child in self.children(disk):
            if not is_new and not blockjobs.same_file(child, overlay):
                raise SnapshotError(self._needs(child, disk))
        uppers = self.children(overlay)
        for child in uppers:
            if not self._known(overlay, child):
                raise SnapshotError(self._needs(child, overlay))
        if self.vm is not None and not self.used(overlay):
            raise SnapshotError(
                f'the VM at {self.vm.address} does not use {overlay}; if its '
                'own VM is off, leave out --qmp, ' + FORGET)
        if len(uppers) > 1:
            raise SnapshotError(self._needs(uppers[1], overlay))
        if self.vm is not None:
            if uppers and not self.used(uppers[0]):
                raise SnapshotError(self._needs(uppers[0], overlay))
            blockjobs.nodes(self.vm, overlay, disk)
        if self.vm is None or self.image_tool.available():
            self.probe(overlay)
        return uppers[0] if uppers else None

    def _needs(self, child: str, image: str) -> str:
        """That a file is in the way, and what to do."""
        text = f'{child} needs {image} as it is'
        for path, content in self.others:
            if store.is_deleting(path) and any(
                    blockjobs.same_file(child, disk['overlay'])
                    for disk in store.overlays(content)):
                return (f'{text}: {content["name"]} is half deleted, delete '
                        'it first')
        if self.used(child) or any(
                blockjobs.same_file(child, path) for _, content in self.others
                for disk in content['disks']['list']
                for path in (disk['file'], disk.get('overlay', ''))):
            return f'{text}: delete what was taken later before, {FORGET}'
        return (f'{text}, and is of no snapshot in {self._place.directory}; '
                'if it is of a restored VM that is not needed any more, '
                f'remove it first, {FORGET}')

    def _known(self, overlay: str, child: str) -> bool:
        """Whether an image on top is the overlay of the next snapshot."""
        return any(blockjobs.same_file(other['file'], overlay)
                   and blockjobs.same_file(other['overlay'], child)
                   for _, content in self.others
                   for other in store.overlays(content))

    def probe(self, image: str) -> None:
        """Raise if another VM than ours writes to what is on an image."""
        above = self.children(image)
        for child in above:
            self.probe(child)
        if above or self.used(image):
            return
        try:
            self.image_tool.probe(image)
        except SnapshotError as problem:
            raise SnapshotError(f'{problem}\n' + (
                'If its VM is running, give its socket with --qmp'
                if self.vm is None else f'End the VM that uses {image} first'
                )) from problem

    def used(self, image: str) -> bool:
        """Whether the VM that is given has an image in one of its disks."""
        return (self.vm is not None
                and blockjobs.root_of(self.vm, image) is not None)

    def children(self, base: str) -> List[str]:
        """Images that are on top of another, where we know to look."""
        found: List[str] = []
        candidates = []
        folders = {os.path.dirname(base)}
        lists = [self._layers, *(content['disks']['list']
                                 for _, content in self.others)]
        for layer in (layer for layers in lists for layer in layers):
            folders.add(os.path.dirname(layer['file']))
            folders.add(os.path.dirname(layer.get('overlay', base)))
        for folder in [self._place.path, self._place.deleting,
                       *(os.path.dirname(path) for path, _ in self.others)]:
            candidates += restored_files(folder)
        for folder in folders:
            if os.path.isdir(folder) and not store.in_dev(folder):
                candidates += [entry.path for entry in os.scandir(folder)
                               if entry.is_file()]
        for path in candidates:
            below = base_of(path)
            if below and blockjobs.same_file(below, base) and \
                    not any(blockjobs.same_file(path, f) for f in found):
                found.append(path)
        return found

    # Changing

    def merge(self, layer: Json, above: Optional[str],
              meanwhile: Callable[[], None] = blockjobs.nothing) -> None:
        """Write an overlay into its disk.  @above is what check() returned.

        @meanwhile may raise until the VM goes on with the disk.
        """
        disk, overlay = layer['file'], layer['overlay']
        self.progress.step(f'merge {overlay} into {disk}')
        self._note(layer, 'begun', above)

        def renew() -> None:
            os.utime(self._path)

        def look() -> None:
            renew()
            meanwhile()
        if self.vm is not None:
            try:
                blockjobs.merge(self.vm, overlay, disk, lambda: self._note(
                    layer, 'completing', above), look)
            except SnapshotError:
                with contextlib.suppress(SnapshotError, OSError):
                    blockjobs.tidy(self.vm)
                    if self.used(overlay):
                        self._note(layer, 'begun', above)
                raise
        else:
            self.image_tool.commit(overlay, renew)
            if above is not None:
                self.image_tool.rebase(above, disk, layer['format'])
        self._note_merged(layer, above)
        self._now.append(overlay)

    def settle(self, layer: Json, is_own: bool = False) -> None:
        """Remove an overlay that is merged, or empty, if nobody has it.

        @is_own: no other VM than ours can have it.
        """
        overlay = layer['overlay']
        if self.vm is not None:
            if self.used(overlay):
                raise SnapshotError(f'the VM at {self.vm.address} still uses '
                                    f'{overlay}')
            blockjobs.forget(self.vm, overlay)
        users = self.children(overlay)
        if users:
            raise SnapshotError(self._needs(users[0], overlay))
        is_own = (is_own or overlay in self._now
                  or self._is_known_run(layer))
        if not is_own or self.image_tool.available():
            self.probe(overlay)
        above = self._notes.get(overlay, {}).get('above')
        if self.noted(layer) != 'merged':
            self._note_merged(layer, above)
        # The next snapshot's disk has to be known before the file goes
        self._tell(layer, above)
        os.unlink(overlay)
        # The notes must not be gone before
        store.sync(os.path.dirname(overlay))

    def _tell(self, layer: Json, above: Optional[str]) -> None:
        """Have others know what merging has changed."""
        self._tell_others(layer['overlay'], layer['file'], layer['format'])
        if above is not None:
            # It has another base, and is perhaps the next but one's disk
            self._tell_others(above, above, 'qcow2')

    def forget(self) -> None:
        """The overlays are left as they are, but where one is merged."""
        for layer in self._layers:
            above = self._notes.get(layer['overlay'], {}).get('above')
            if self._is_below(layer, above):
                self._tell(layer, above)

    @staticmethod
    def _is_below(layer: Json, above: Optional[str]) -> bool:
        """Whether what was on the overlay, if anything, is on the disk."""
        below = base_of(above) if above is not None else None
        return (below is not None
                and blockjobs.same_file(below, layer['file']))

    def _tell_others(self, old: str, disk: str, image_format: str) -> None:
        """Who had a file for its disk has another now, or it has changed."""
        for path, content in self.others:
            changed = False
            for entry in store.overlays(content):
                if blockjobs.same_file(entry['file'], old):
                    entry.update(file=disk, format=image_format,
                                 **store.file_state(disk))
                    changed = True
            if changed:
                store.write_json(path, content)

    def rewritten(self, disk: str, image_format: str) -> None:
        """A disk has changed, but not what others need of it."""
        self._tell_others(disk, disk, image_format)


def restored_files(path: str) -> List[str]:
    """Disks of VMs that were restored from a snapshot."""
    record = os.path.join(path, RESTORED)
    if not os.path.exists(record):
        return []
    return [file for file in store.read_json(record).get('files', [])
            if os.path.exists(file)]
