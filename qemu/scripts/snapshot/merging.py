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
import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from . import blockjobs, records, store
from .errors import SnapshotError
from .images import QemuImg, base_of, check_no_internal
from .progress import Progress
from .vm import VM, new_mark


Json = Dict[str, Any]

# More than a second, after which a note is renewed
LATER_NS = 5 * 10 ** 9
FORGET = 'or call it with --forget, which leaves all disks as they are'


def _key(layer: Json) -> str:
    """What the notes know a layer by: internal snapshots have no overlay."""
    return str(layer.get('overlay', layer['file']))


def _state(path: str) -> Json:
    """What tells later that a file is the same, and was not written to."""
    state = store.file_state(path)
    return dict(state, inode=os.stat(path).st_ino) if state else {}


class Merging:
    """Overlays ("layers") of one snapshot, and notes of how far each is."""

    def __init__(self, place: store.Snapshot, folder: str,
                 layers: List[Json], others: List[Tuple[str, Json]],
                 vm: Optional[VM], image_tool: QemuImg, progress: Progress,
                 restored_gone: bool = False):
        """@folder: where the notes are, and end with the snapshot.

        @others: from store.neighbours().
        @restored_gone: so are overlays of restored VMs that cannot be seen.
        """
        self.vm = vm
        self.image_tool = image_tool
        self.progress = progress
        self._place = place
        self._restored_gone = restored_gone
        self._layers = layers
        self.others = others
        self._now: List[str] = []
        self._mark: Optional[str] = None
        self._renewed = 0.0
        self._path = os.path.join(folder, store.NOTES)
        self._notes: Json = (store.read_json(self._path)
                             if os.path.exists(self._path) else {})
        if any('files' not in note for note in self._notes.values()):
            raise SnapshotError(f'{self._path} is of an earlier version: '
                                'have that go on')

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

    def tidy(self) -> None:
        """End the VM's jobs that are left.

        What they were told to do, and have not, QEMU will not do any more.
        """
        if self.vm is None:
            return
        blockjobs.tidy(self.vm)
        for layer in self._layers:
            if self.noted(layer) in ('begun', 'completing') and \
                    self._is_known_run(layer) and self.used(layer['overlay']):
                files = self._notes[layer['overlay']]['files']
                files[layer['file']] = _state(layer['file'])
                self._renote(layer, state='begun', stamp=None)

    def noted(self, layer: Json) -> Optional[str]:
        """'begun', 'completing' (by QEMU), 'merged', or None."""
        note = self._notes.get(_key(layer))
        return str(note['state']) if note is not None else None

    def _note(self, layer: Json, state: str, above: Optional[str],
              but: Optional[Json] = None) -> None:
        """@but: of these files, what is known is not what they are now."""
        files = {path: _state(path) for path in (
            _key(layer), layer['file'], above) if path is not None}
        self._notes[_key(layer)] = {
            'state': state, 'above': above, 'vm': self._mark, 'stamp': None,
            'files': {**files, **(but or {})}}
        store.write_json(self._path, self._notes)

    def _renote(self, layer: Json, **changes: Any) -> None:
        """Change only a part of what is noted."""
        self._notes[_key(layer)].update(changes)
        store.write_json(self._path, self._notes)

    def _renew(self, layer: Json) -> None:
        """Note that, until now, it is us who write to a disk.

        By the disk's own time: clocks differ, and other disks tell nothing.
        If that fails, it will seem to have been somebody else.
        """
        if time.monotonic() < self._renewed + 1:
            return
        self._renewed = time.monotonic()
        disk = layer['file']
        with contextlib.suppress(OSError):
            os.utime(disk)
        with contextlib.suppress(OSError):
            self._renote(layer, stamp=store.file_state(disk).get(
                'mtime-ns', time.time_ns()))

    def _note_merged(self, layer: Json, above: Optional[str],
                     found: bool = False) -> None:
        """@found: that was done by a program that was killed then."""
        paths = [layer['file'], *([above] if above is not None else [])]
        # What somebody has written to since is not what others need
        but = {path: self._notes[_key(layer)]['files'][path]
               for path in paths if found and self._strayed(layer, path)}
        # All of it, before anything says that it is there
        for path in paths:
            store.sync(path)
        if above is not None and above not in but:
            self._put_back(layer, above)
        self._note(layer, 'merged', above, but)

    def _put_back(self, layer: Json, above: str) -> None:
        """Give an image its time back, of which only its base has changed.

        It may be the disk of a snapshot elsewhere, which is not told.
        """
        children = self.children(above)
        if all(self._known(above, child) for child in children):
            return
        if self.vm is not None and not any(map(self.used, children)):
            return  # The VM writes to it
        before = self._notes[_key(layer)]['files'][above]
        if before:
            with contextlib.suppress(OSError):
                os.utime(above, ns=(os.stat(above).st_atime_ns,
                                    before['mtime-ns']))

    # Looking, without changing anything

    def gone(self, layer: Json) -> bool:
        """Whether an overlay is not there any more, as it should be."""
        overlay = layer['overlay']
        if os.path.lexists(overlay) or self.used(overlay):
            return False
        if self.noted(layer) == 'merged' or self._has_left(layer) or \
                self._notes.get(overlay, {}).get('asked'):
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
        if not used and any(self._replaced(layer, path)
                            for path in (overlay, disk)):
            raise self._unsure(layer, [])
        unwritten = note['files'].get(overlay) == _state(overlay)
        if self._is_below(layer, note['above']):
            # That was changed last of all
            if unwritten:
                return True
            raise self._unsure(layer, [])
        if note['state'] == 'begun' and not used and \
                self._strayed(layer, disk):
            raise self._unsure(layer, [])
        if note['state'] == 'begun' and note['above'] is None:
            return False
        if used and note['state'] == 'completing' and \
                self._is_known_run(layer):
            return False  # QEMU has not done what it was told
        users = self.children(overlay)
        if users or used:
            # It has become somebody's disk since.  If the disk below is as it
            # was when that began, the overlay is right in any case.
            state = _state(disk)
            if note['state'] == 'begun' or \
                    state and note['files'].get(disk) == state:
                return False
            raise self._unsure(layer, users)
        if note['above'] is not None and note['state'] != 'merged':
            return False
        if not (unwritten if note['state'] == 'merged'
                else self._has_left(layer)):
            raise self._unsure(layer, [])
        return True

    def _is_known_run(self, layer: Json) -> bool:
        """Whether the VM is the one that its note is of."""
        note = self._notes.get(layer['overlay'], {})
        return self.vm is not None and self.vm.has_mark(note.get('vm'))

    def _has_left(self, layer: Json) -> bool:
        """Whether the VM, as told, has the disk itself and not the overlay."""
        return (self.noted(layer) == 'completing' and self.used(layer['file'])
                and not self.used(layer['overlay'])
                and self._is_known_run(layer))

    def _replaced(self, layer: Json, path: str) -> bool:
        """Whether a file is another than when it was noted, or older."""
        was, now = self._notes[_key(layer)]['files'].get(path), _state(path)
        return bool(was and now) and (now['inode'] != was['inode']
                                      or now['mtime-ns'] < was['mtime-ns'])

    def _strayed(self, layer: Json, path: str) -> bool:
        """Whether a file was changed after we had ended, or is another.

        If we had been writing to it, it is hardly newer than the last stamp.
        If QEMU had, for us, it may have gone on, but then the VM has written
        to the overlay as well.
        """
        note, now = self._notes.get(_key(layer)), _state(path)
        if note is None or not now:
            return False
        if self._replaced(layer, path):
            return True
        if note['stamp'] is None:
            return bool(now != note['files'].get(path))
        newest = [note['stamp']]
        if note['vm'] is not None:
            newest.append(os.stat(layer['overlay']).st_mtime_ns)
        return bool(now['mtime-ns'] > max(newest) + LATER_NS)

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
        # Otherwise it might only not be to be seen
        with contextlib.suppress(OSError):
            self._renote(layer, asked=True)
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
            raise SnapshotError(f'{overlay} is not an overlay of {disk}: if '
                                'it was, have it be so again, ' + FORGET)
        if not os.path.exists(disk):
            raise SnapshotError(f'{disk} cannot be seen: have it be there, '
                                + FORGET)
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
        if self.vm is None:
            self.image_tool.check_rights(overlay, disk)
        self.check_others(overlay, *uppers)
        if self.vm is None or self.image_tool.available():
            self.probe(overlay)
        if self.vm is None:
            # It may be on the disk instead
            self._probe_one(disk)
        return uppers[0] if uppers else None

    def check_others(self, image: str, *above: str,
                     rewriting: Optional[Json] = None) -> None:
        """Raise if a snapshot that has an image for its disk is spoiled.

        It would be told of the disk that it has next, and then seem good.

        @rewriting: the disk of which only an internal snapshot is deleted.
        """
        for path, content in self.others:
            for entry in store.overlays(content):
                file, overlay = entry['file'], entry['overlay']
                if not any(blockjobs.same_file(file, one)
                           for one in (image, *above)):
                    continue
                ours = rewriting is not None and self.noted(rewriting) and \
                    not self._strayed(rewriting, rewriting['file'])
                what = None
                if store.is_deleting(path):
                    what = 'is half deleted: delete it first'
                elif not ours and not store.fits(entry) or \
                        self.used(file) and not self.used(overlay):
                    what = (f'does not fit {file} any more, which was written '
                            'to since: delete that with --forget first')
                elif rewriting is None and blockjobs.same_file(file, image) \
                        and not self.used(overlay) and \
                        not os.path.exists(overlay):
                    what = (f'needs {image}, and {overlay} cannot be seen: '
                            'have it be there, or delete that with --forget '
                            'first')
                if what is not None:
                    raise SnapshotError(f'{content["name"]} {what}')

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
                'if it is of one elsewhere, delete that before; if it is of a '
                'restored VM that is not needed any more, remove it first, '
                + FORGET)

    def _known(self, overlay: str, child: str) -> bool:
        """Whether an image on top is the overlay of the next snapshot."""
        return any('foreign' not in content
                   and blockjobs.same_file(other['file'], overlay)
                   and blockjobs.same_file(other['overlay'], child)
                   for _, content in self.others
                   for other in store.overlays(content))

    def probe(self, image: str) -> None:
        """Raise if another VM than ours writes to what is on an image."""
        above = self.children(image)
        for child in above:
            self.probe(child)
        if not above and not self.used(image):
            self._probe_one(image)

    def _probe_one(self, image: str) -> None:
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
        own = [layer for layer in self._layers if 'overlay' in layer]
        for folder, above in [
                (self._place.path, own), (self._place.deleting, own),
                *((os.path.dirname(path), store.overlays(content))
                  for path, content in self.others)]:
            candidates += records.files(
                os.path.join(folder, records.RESTORED),
                not self._restored_gone and any(
                    blockjobs.same_file(layer['file'], base)
                    for layer in above),
                'call it with --restored-gone')
        candidates += records.files(records.beside(base))
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

        def renew() -> None:
            self._renew(layer)

        def look() -> None:
            renew()
            meanwhile()
        with self._writing(layer, above):
            if self.vm is not None:
                blockjobs.merge(self.vm, overlay, disk, lambda: self._note(
                    layer, 'completing', above), look)
            else:
                self.image_tool.commit(overlay, renew)
                if above is not None:
                    self.image_tool.rebase(above, disk, layer['format'])
        self._note_merged(layer, above)
        self._now.append(overlay)

    def rewrite(self, layer: Json, action: Callable[[], None]) -> None:
        """Change a disk, but not what others need of it."""
        with self._writing(layer, None):
            action()
        self._tell_others(layer['file'], layer['file'], layer['format'],
                          _state(layer['file']))

    @contextlib.contextmanager
    def _writing(self, layer: Json, above: Optional[str]) -> Iterator[None]:
        """Note that we write to a disk, and how it is if that has failed."""
        self._note(layer, 'begun', above)
        self._renewed = 0.0
        self._renew(layer)
        try:
            yield
        except SnapshotError:
            with contextlib.suppress(SnapshotError, OSError):
                if self.vm is not None:
                    blockjobs.tidy(self.vm)
                if self.vm is None or self.used(layer['overlay']):
                    self._note(layer, 'begun', above)
            raise

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
        above = self._notes.get(overlay, {}).get('above')
        with self._not_restored(overlay, above):
            users = self.children(overlay)
            if users:
                raise SnapshotError(self._needs(users[0], overlay))
            is_own = (is_own or overlay in self._now
                      or self._is_known_run(layer))
            if not is_own or self.image_tool.available():
                self.probe(overlay)
            if self.noted(layer) != 'merged':
                self._note_merged(layer, above, found=True)
            # The next snapshot's disk has to be known before the file goes
            self._tell(layer, above)
            records.replace(records.beside(layer['file']), overlay, above)
            os.unlink(overlay)
        # The notes must not be gone before
        store.sync(os.path.dirname(overlay))

    @contextlib.contextmanager
    def _not_restored(self, *images: Optional[str]) -> Iterator[None]:
        """Nobody restores a snapshot with one of these disks meanwhile."""
        with contextlib.ExitStack() as stack:
            for path, content in self.others:
                if not store.is_deleting(path) and any(
                        blockjobs.same_file(entry['file'], image)
                        for entry in store.overlays(content)
                        for image in images if image is not None):
                    stack.enter_context(
                        store.Snapshot(os.path.dirname(path)).guard())
            yield

    def _tell(self, layer: Json, above: Optional[str]) -> None:
        """Have others know what merging has changed."""
        disk, known = layer['file'], self._notes[layer['overlay']]['files']
        self._tell_others(layer['overlay'], disk, layer['format'],
                          known[disk])
        if above is not None:
            # It has another base, and is perhaps the next but one's disk
            self._tell_others(above, above, 'qcow2', known[above])

    def forget(self) -> None:
        """The overlays are left as they are, but where one is merged."""
        for layer in self._layers:
            above = self._notes.get(layer['overlay'], {}).get('above')
            if self._is_below(layer, above):
                if self.noted(layer) != 'merged':
                    self._note_merged(layer, above, found=True)
                self._tell(layer, above)

    @staticmethod
    def _is_below(layer: Json, above: Optional[str]) -> bool:
        """Whether what was on the overlay, if anything, is on the disk."""
        below = base_of(above) if above is not None else None
        return (below is not None
                and blockjobs.same_file(below, layer['file']))

    def _tell_others(self, old: str, disk: str, image_format: str,
                     state: Json) -> None:
        """Who had a file for its disk has another now, or it has changed."""
        for path, content in self.others:
            changed = False
            if 'foreign' in content:
                continue
            for entry in store.overlays(content):
                if blockjobs.same_file(entry['file'], old):
                    if not blockjobs.same_file(entry['file'], disk):
                        # Not the name of a link, which may change
                        entry['file'] = disk
                    entry.update(format=image_format, **{
                        key: value for key, value in state.items()
                        if key != 'inode'})
                    changed = True
            if changed:
                store.write_json(path, content)
