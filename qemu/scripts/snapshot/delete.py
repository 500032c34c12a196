# SPDX-License-Identifier: GPL-2.0-or-later

"""
delete: removes a snapshot and merges the overlays that it has cost.

A snapshot's disk has the overlay above it that was created with it.  To
delete the snapshot is to write this overlay into the disk: then the chain is
as if there had been no snapshot.  Whoever had the overlay for their disk, the
VM or the snapshot that was taken next, has the disk itself afterwards.

From the first byte that is merged on, the snapshot is worth nothing.  So it
is renamed before; if deleting stops half-way, deleting again goes on, from
the notes in class Merged.
"""

import argparse
import os
import shutil
from typing import Any, Dict, List, Optional, Tuple

from . import blockjobs, disks, store
from .errors import NotUndone, Refused, SnapshotError
from .images import QemuImg, base_of, check_no_internal
from .partial import delete_partial
from .progress import Progress
from .signals import Signals
from .vm import VM


Json = Dict[str, Any]

RESTORED = 'restored.json'


class Merged:
    """Notes of how far each overlay is.

    An overlay that a VM may have left for its disk must not be written into
    that a second time: the disk may be newer by then.
    """

    def __init__(self, place: store.Snapshot):
        self._path = os.path.join(place.deleting, 'merged.json')
        self._notes: Json = (store.read_json(self._path)
                             if os.path.exists(self._path) else {})

    def note(self, layer: Json, state: str) -> None:
        """@state: 'begun', 'completing' (by QEMU) or 'merged'."""
        self._notes[layer['overlay']] = {'state': state,
                                         'above': layer.get('above')}
        store.write_json(self._path, self._notes)

    def has(self, layer: Json, vm: Optional[VM]) -> bool:
        """Whether a layer is merged; refuses if that cannot be told."""
        overlay, disk = layer['overlay'], layer['file']
        note = self._notes.get(overlay, {'state': None, 'above': None})
        if note['state'] == 'merged':
            return True
        if note['above'] is not None:
            # What is above it was changed last of all
            below = base_of(note['above'])
            return below is not None and blockjobs.same_file(below, disk)
        if note['state'] != 'completing':
            return False
        if vm is None:
            raise Refused(
                f'QEMU was told to go on with {disk} instead of {overlay}, '
                'and has ended since: if the former has what the VM wrote '
                'last, remove the latter; otherwise "qemu-img commit" the '
                'latter before; then delete again')
        return (blockjobs.root_of(vm, overlay) is None
                and blockjobs.root_of(vm, disk) is not None)


class Delete:
    """The deletion of one snapshot."""

    def __init__(self, options: argparse.Namespace, progress: Progress):
        self.options = options
        self.progress = progress
        self.place = store.Snapshot(options.snapshot)
        self.vm: Optional[VM] = None
        self.signals = Signals()
        self.others: List[Tuple[store.Snapshot, Json]] = []

    def run(self) -> Json:
        """Returns what the VM's disks are now."""
        if self.options.qmp:
            self.vm = VM(self.options.qmp)
        try:
            if self.vm is not None:
                self.vm.claim()
            binary = self.vm.process().get('binary') if self.vm else None
            image_tool = QemuImg(self.options.qemu_img, binary)
            if self.options.partial:
                return delete_partial(self.place, self.vm, image_tool,
                                      self.progress)
            return self._delete(image_tool)
        finally:
            self.progress.end()
            if self.vm is not None:
                self.vm.close()

    def _delete(self, image_tool: QemuImg) -> Json:
        place = self.place
        try:
            if os.path.isdir(place.deleting):
                place.lock(place.deleting)
                manifest = store.parse(os.path.join(place.deleting,
                                                    store.MANIFEST))
                layers = self._plan(image_tool, manifest, True)
            else:
                # Nobody restores it from when it was looked at on
                with place.guard():
                    manifest = place.read()
                    layers = self._plan(image_tool, manifest, False)
                    self.signals.check()
                    # From here on it is no snapshot any more
                    os.rename(place.path, place.deleting)
                store.sync(place.directory)
                place.lock(place.deleting)
        except (SnapshotError, OSError) as problem:
            raise Refused(str(problem)) from problem
        mode = manifest['disks']['mode']
        try:
            merged = Merged(place)
            for layer in layers:
                if mode == 'external':
                    self._merge(image_tool, layer, merged)
                else:
                    self._delete_internal(image_tool, layer)
            shutil.rmtree(place.deleting)
        except (SnapshotError, OSError) as problem:
            raise NotUndone(
                f'{place.name} is half deleted: {problem}',
                [f'delete {place.path} again, to go on']) from problem
        return {'name': place.name, 'mode': mode,
                'disks': [{'id': layer['id'], 'file': layer['file'],
                           'was': layer.get('overlay')} for layer in layers]}

    def _plan(self, image_tool: QemuImg, manifest: Json,
              again: bool) -> List[Json]:
        """The disks that are to be changed, all of which can be."""
        mode = manifest['disks']['mode']
        layers: List[Json] = (manifest['disks']['list'] if mode != 'none'
                              else [])
        if layers and self.vm is None:
            image_tool.need('if the VM is off')
        self.others = [(other, other.read()) for other
                       in store.snapshots(self.place.directory)
                       if other.name != self.place.name]
        if mode != 'external':
            for layer in layers:
                self._check_internal(image_tool, layer, manifest)
            return layers
        merged = Merged(self.place)
        # What is merged and gone need not be looked at again
        layers = [layer for layer in layers
                  if os.path.exists(layer['overlay'])]
        for layer in layers:
            layer['merged'] = again and merged.has(layer, self.vm)
            if not layer['merged']:
                layer['above'] = self._check(image_tool, layer, manifest,
                                             again)
        return layers

    def _check(self, image_tool: QemuImg, layer: Json, manifest: Json,
               again: bool) -> Optional[str]:
        """Refuse if anybody needs what will change.

        Returns the image whose base is the overlay, if there is one.
        """
        disk, overlay = layer['file'], layer['overlay']
        base = base_of(overlay)
        if base is None or not blockjobs.same_file(base, disk):
            raise Refused(f'{overlay} is not an overlay of {disk}')
        check_no_internal(overlay)
        if not again and any(layer.get(key) != value for key, value
                             in store.file_state(disk).items()):
            raise Refused(f'{disk} was written to after the snapshot: '
                          f'{overlay} does not fit it any more')
        for child in self._children(disk, manifest):
            if not blockjobs.same_file(child, overlay):
                raise Refused(f'{child} needs {disk} as it is; if it is of a '
                              'restored VM that is not needed any more, '
                              'remove it first')
        nexts = [other for _, content in self.others
                 for other in content['disks']['list']
                 if content['disks']['mode'] == 'external'
                 and blockjobs.same_file(other['file'], overlay)]
        uppers = self._children(overlay, manifest)
        for child in uppers:
            if not any(blockjobs.same_file(child, other['overlay'])
                       for other in nexts):
                raise Refused(f'{child} needs {overlay}, and is of no '
                              f'snapshot in {self.place.directory}')
        if self.vm is not None and \
                blockjobs.root_of(self.vm, overlay) is None:
            raise Refused(f'the VM at {self.vm.address} does not use '
                          f'{overlay}; if its own VM is off, leave out --qmp')
        if self.vm is None:
            self._check_off(image_tool, (uppers or [overlay])[0], manifest)
        return uppers[0] if uppers else None

    def _check_internal(self, image_tool: QemuImg, layer: Json,
                        manifest: Json) -> None:
        """Refuse if an internal snapshot cannot be deleted from here."""
        if self.vm is None:
            self._check_off(image_tool, layer['file'], manifest)
        elif not any(blockjobs.same_file(disk['file'], layer['file'])
                     for disk in disks.writable(self.vm)):
            raise Refused(f'the VM at {self.vm.address} does not write to '
                          f'{layer["file"]}: delete what was taken later '
                          'before, or, if its own VM is off, leave out --qmp')

    def _check_off(self, image_tool: QemuImg, image: str,
                   manifest: Json) -> None:
        """Refuse if a VM writes to the topmost image."""
        above = self._children(image, manifest)
        while above:
            image = above[0]
            above = self._children(image, manifest)
        try:
            image_tool.probe(image)
        except SnapshotError as problem:
            raise Refused(f'{problem}\nIf its VM is running, give its socket '
                          'with --qmp') from problem

    def _children(self, base: str, manifest: Json) -> List[str]:
        """Images that are on top of another, where we know to look."""
        found: List[str] = []
        candidates = []
        folders = {os.path.dirname(base)}
        for content in [manifest, *(content for _, content in self.others)]:
            for layer in content['disks']['list']:
                folders.add(os.path.dirname(layer['file']))
                folders.add(os.path.dirname(layer.get('overlay', base)))
        for place in [self.place, *(other for other, _ in self.others)]:
            candidates += restored_files(place.path)
            candidates += restored_files(place.deleting)
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

    def _merge(self, image_tool: QemuImg, layer: Json,
               merged: Merged) -> None:
        disk, overlay = layer['file'], layer['overlay']
        if not layer['merged']:
            self.progress.step(f'merge {overlay} into {disk}')
            self.signals.check()
            merged.note(layer, 'begun')
            if self.vm is not None:
                blockjobs.merge(self.vm, overlay, disk,
                                lambda: merged.note(layer, 'completing'),
                                self.signals.check)
            else:
                image_tool.commit(overlay)
                if layer['above'] is not None:
                    image_tool.rebase(layer['above'], disk, layer['format'])
            merged.note(layer, 'merged')
        # The next snapshot's disk has to be known before the file goes
        self._tell_others(overlay, disk, layer['format'])
        os.unlink(overlay)

    def _delete_internal(self, image_tool: QemuImg, layer: Json) -> None:
        self.signals.check()
        name, disk = self.place.name, layer['file']
        self.progress.step(f'delete internal snapshot of {disk}')
        if self.vm is not None:
            node = disks.has_internal(self.vm, layer, name)
            if node is not None:
                disks.delete_internal(self.vm, node, name)
        else:
            info = image_tool.info(disk)
            if name in [s['name'] for s in info.get('snapshots', [])]:
                image_tool.delete_internal(disk, name)
            self._tell_others(disk, disk, layer['format'])

    def _tell_others(self, old: str, disk: str, image_format: str) -> None:
        """Who had a file for its disk has another now, or it has changed."""
        for other, content in self.others:
            changed = False
            if content['disks']['mode'] != 'external':
                continue
            for entry in content['disks']['list']:
                if blockjobs.same_file(entry['file'], old):
                    entry.update(file=disk, format=image_format,
                                 **store.file_state(disk))
                    changed = True
            if changed:
                other.write(content)


def restored_files(path: str) -> List[str]:
    """Disks of VMs that were restored from a snapshot."""
    record = os.path.join(path, RESTORED)
    if not os.path.exists(record):
        return []
    return [file for file in store.read_json(record).get('files', [])
            if os.path.exists(file)]
