# SPDX-License-Identifier: GPL-2.0-or-later

"""
delete: removes a snapshot and merges the overlays that it has cost.

A snapshot's disk has the overlay above it that was created with it.  To
delete the snapshot is to write this overlay into the disk: then the chain is
as if there had been no snapshot.  Whoever had the overlay for their disk, the
VM or the snapshot that was taken next, has the disk itself afterwards.

From the first byte that is merged on, the snapshot is worth nothing.  So it
is renamed before; if deleting stops half-way, deleting again goes on.
"""

import argparse
import os
import shutil
import struct
from typing import Any, Dict, List, Optional, Tuple

from . import blockjobs, disks, store
from .errors import NotUndone, Refused, SnapshotError
from .images import QemuImg
from .progress import Progress
from .signals import Signals
from .undo import Undo
from .vm import VM


Json = Dict[str, Any]

RESTORED = 'restored.json'


def base_of(path: str) -> Optional[str]:
    """The file that backs a qcow2 image, by its header; None if none does."""
    try:
        with open(path, 'rb') as file:
            magic, _, offset, length = struct.unpack('>4sIQI', file.read(20))
            if magic != b'QFI\xfb' or not offset:
                return None
            file.seek(offset)
            name = os.fsdecode(file.read(min(length, 1023)))
    except (OSError, struct.error):
        return None
    return os.path.join(os.path.dirname(path), name)


class Delete:
    """The deletion of one snapshot."""

    def __init__(self, options: argparse.Namespace, progress: Progress):
        self.options = options
        self.progress = progress
        self.place = store.Snapshot(options.snapshot)
        self.vm: Optional[VM] = None
        self.signals = Signals()

    def run(self) -> Json:
        """Returns what the VM's disks are now."""
        if self.options.qmp:
            self.vm = VM(self.options.qmp)
        binary = self.vm.process().get('binary') if self.vm else None
        image_tool = QemuImg(self.options.qemu_img, binary)
        try:
            if self.options.partial:
                return self._delete_partial(image_tool)
            return self._delete(image_tool)
        finally:
            self.progress.end()
            if self.vm is not None:
                self.vm.close()

    # What "create" has left

    def _delete_partial(self, image_tool: QemuImg) -> Json:
        place = self.place
        if not os.path.isdir(place.partial):
            raise Refused(f'there is no partial snapshot {place.path}')
        place.lock(place.partial)
        try:
            journal = place.journal()
        except SnapshotError:
            # "create" writes its journal before it changes anything
            place.abandon()
            return {'name': place.name}
        pid = journal.get('pid')
        if self.vm is None and pid and journal.get('disks') and \
                os.path.exists(f'/proc/{pid}'):
            raise Refused(f'the VM of the partial snapshot (process {pid}) '
                          'runs: give its socket with --qmp')
        if self.vm is None:
            image_tool.need('to merge the overlays of a VM that is off')
        todo = Undo(place, journal, self.vm, image_tool, self.progress).run()
        if todo:
            raise NotUndone(f'{place.path} is not quite undone', todo)
        return {'name': place.name}

    # A whole snapshot

    def _delete(self, image_tool: QemuImg) -> Json:
        place = self.place
        try:
            again = os.path.isdir(place.deleting)
            if again:
                place.lock(place.deleting)
                manifest = store.parse(os.path.join(place.deleting,
                                                    store.MANIFEST))
            else:
                manifest = place.read()
            mode = manifest['disks']['mode']
            layers = manifest['disks']['list'] if mode != 'none' else []
            if layers and self.vm is None:
                image_tool.need('if the VM is off')
            others = [(other, other.read()) for other
                      in store.snapshots(place.directory)
                      if other.name != place.name]
            if mode == 'external':
                # What is merged already need not be looked at again
                layers = [layer for layer in layers
                          if os.path.exists(layer['overlay'])]
                for layer in layers:
                    layer['above'] = self._check(image_tool, layer, manifest,
                                                 others, again)
            elif self.vm is None:
                for layer in layers:
                    self._check_off(image_tool, layer['file'], manifest, [])
        except (SnapshotError, OSError) as problem:
            raise Refused(str(problem)) from problem
        self.signals.check()
        # From here on it is no snapshot any more
        if not again:
            os.rename(place.path, place.deleting)
            store.sync(place.directory)
            place.lock(place.deleting)
        try:
            for layer in layers:
                if mode == 'external':
                    self._merge(image_tool, layer, others)
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

    def _check(self, image_tool: QemuImg, layer: Json, manifest: Json,
               others: List[Tuple[store.Snapshot, Json]],
               again: bool) -> Optional[str]:
        """Refuse if anybody needs what will change.

        Returns the image whose base is the overlay, if there is one.
        """
        disk, overlay = layer['file'], layer['overlay']
        base = base_of(overlay)
        if base is None or not blockjobs.same_file(base, disk):
            raise Refused(f'{overlay} is not an overlay of {disk}')
        if not again and any(layer.get(key) != value for key, value
                             in store.file_state(disk).items()):
            raise Refused(f'{disk} was written to after the snapshot: '
                          f'{overlay} does not fit it any more')
        for child in self._children(disk, manifest, others):
            if not blockjobs.same_file(child, overlay):
                raise Refused(f'{child} needs {disk} as it is; if it is of a '
                              'restored VM that is not needed any more, '
                              'remove it first')
        nexts = [other for _, content in others
                 for other in content['disks']['list']
                 if content['disks']['mode'] == 'external'
                 and blockjobs.same_file(other['file'], overlay)]
        uppers = self._children(overlay, manifest, others)
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
            self._check_off(image_tool, (uppers or [overlay])[0], manifest,
                            others)
        return uppers[0] if uppers else None

    def _check_off(self, image_tool: QemuImg, image: str, manifest: Json,
                   others: List[Tuple[store.Snapshot, Json]]) -> None:
        """Refuse if a VM writes to the topmost image."""
        above = self._children(image, manifest, others)
        while above:
            image = above[0]
            above = self._children(image, manifest, others)
        try:
            image_tool.probe(image)
        except SnapshotError as problem:
            raise Refused(f'{problem}\nIf its VM is running, give its socket '
                          'with --qmp') from problem

    def _children(self, base: str, manifest: Json,
                  others: List[Tuple[store.Snapshot, Json]]) -> List[str]:
        """Images that are on top of another, where we know to look."""
        found: List[str] = []
        candidates = []
        folders = {os.path.dirname(base)}
        for content in [manifest, *(content for _, content in others)]:
            for layer in content['disks']['list']:
                folders.add(os.path.dirname(layer['file']))
                folders.add(os.path.dirname(layer.get('overlay', base)))
        for place in [self.place, *(other for other, _ in others)]:
            candidates += restored_files(place.path)
            candidates += restored_files(place.deleting)
        for folder in folders:
            if os.path.isdir(folder) and not folder.startswith('/dev'):
                candidates += [entry.path for entry in os.scandir(folder)
                               if entry.is_file()]
        for path in candidates:
            below = base_of(path)
            if below and blockjobs.same_file(below, base) and \
                    not any(blockjobs.same_file(path, f) for f in found):
                found.append(path)
        return found

    def _merge(self, image_tool: QemuImg, layer: Json,
               others: List[Tuple[store.Snapshot, Json]]) -> None:
        disk, overlay = layer['file'], layer['overlay']
        self.progress.step(f'merge {overlay} into {disk}')
        if self.vm is not None:
            blockjobs.merge(self.vm, overlay, disk, self.signals.check)
        else:
            self.signals.check()
            image_tool.commit(overlay)
            if layer['above'] is not None:
                image_tool.rebase(layer['above'], disk, layer['format'])
        # The next snapshot's disk has to be known before the file goes
        for other, content in others:
            changed = False
            for entry in content['disks']['list']:
                if blockjobs.same_file(entry['file'], overlay):
                    entry.update(file=disk, format=layer['format'],
                                 **store.file_state(disk))
                    changed = True
            if changed:
                other.write(content)
        os.unlink(overlay)

    def _delete_internal(self, image_tool: QemuImg, layer: Json) -> None:
        self.signals.check()
        name = self.place.name
        self.progress.step(f'delete internal snapshot of {layer["file"]}')
        if self.vm is not None:
            node = disks.has_internal(self.vm, layer, name)
            if node is not None:
                disks.delete_internal(self.vm, node, name)
            return
        info = image_tool.info(layer['file'])
        if name in [s['name'] for s in info.get('snapshots', [])]:
            image_tool.delete_internal(layer['file'], name)


def restored_files(path: str) -> List[str]:
    """Disks of VMs that were restored from a snapshot."""
    record = os.path.join(path, RESTORED)
    if not os.path.exists(record):
        return []
    return [file for file in store.read_json(record).get('files', [])
            if os.path.exists(file)]
