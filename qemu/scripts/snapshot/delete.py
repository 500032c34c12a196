# SPDX-License-Identifier: GPL-2.0-or-later

"""
delete: removes a snapshot and merges the overlays that it has cost.

A snapshot's disk has the overlay above it that was created with it.  To
delete the snapshot is to write this overlay into the disk: then the chain is
as if there had been no snapshot.  Whoever had the overlay for their disk, the
VM or the snapshot that was taken next, has the disk itself afterwards.

From the first byte that is merged on, the snapshot is worth nothing.  So it
is renamed before; if deleting stops half-way, deleting again goes on, from
the notes of class Merging.
"""

import argparse
import os
from typing import Any, Dict, List, Optional

from . import blockjobs, disks, store
from .errors import Interrupted, NotUndone, Refused, SnapshotError
from .images import QemuImg, base_of
from .merging import FORGET, Merging
from .partial import delete_partial
from .progress import Progress
from .signals import Signals
from .vm import VM


Json = Dict[str, Any]


def _is_on(disk: str, overlay: str) -> bool:
    """Whether merging an overlay changes a disk: its data, or its base."""
    base = base_of(disk)
    return (blockjobs.same_file(disk, overlay)
            or base is not None and blockjobs.same_file(base, overlay))


class Delete:
    """The deletion of one snapshot."""

    def __init__(self, options: argparse.Namespace, progress: Progress):
        self.options = options
        self.progress = progress
        self.place = store.Snapshot(options.snapshot)
        self.vm: Optional[VM] = None
        self.signals = Signals()
        self.merging: Merging

    def run(self) -> Json:
        """Returns what the VM's disks are now."""
        if self.options.qmp:
            self.vm = VM(self.options.qmp)
        try:
            if self.vm is not None:
                self.vm.claim()
            binary = self.vm.process().get('binary') if self.vm else None
            image_tool = QemuImg(self.options.qemu_img, binary)
            with store.alone(self.place.directory):
                if self.options.partial:
                    return delete_partial(self.place, self.vm, image_tool,
                                          self.options, self.progress)
                return self._delete(image_tool)
        finally:
            self.progress.end()
            if self.vm is not None:
                self.vm.close()

    def _delete(self, image_tool: QemuImg) -> Json:
        place = self.place
        again = os.path.isdir(place.deleting)
        manifest: Optional[Json] = None
        layers: List[Json] = []
        try:
            if again:
                self._check_owner(place.deleting)
                place.lock(place.deleting)
                manifest = place.condemned()
                self._check_owner(place.deleting)
                if manifest is not None:
                    layers = self._plan(image_tool, manifest, True)
            else:
                # Nobody restores it from when it was looked at on
                with place.guard():
                    manifest = place.read()
                    self._check_owner(place.path)
                    layers = self._plan(image_tool, manifest, False)
                    self.signals.check()
                    # From here on it is no snapshot any more
                    os.rename(place.path, place.deleting)
        except (Interrupted, Refused):
            raise
        except (SnapshotError, OSError) as problem:
            raise Refused(str(problem)) from problem
        try:
            store.sync(place.directory)
            if manifest is not None:
                # It may be what has filled the file system
                image = manifest['image'].get('file', store.IMAGE)
                place.remove_image(image)
            if not again:
                place.lock(place.deleting)
            if manifest is not None and layers:
                self._change(image_tool, manifest, layers)
            place.remove()
        # Whatever it is, a bug of ours included
        except Exception as problem:
            raise NotUndone(
                f'{place.name} is half deleted: {problem}',
                [f'delete {place.path} again, to go on']) from problem
        return {'name': place.name,
                'disks': [{'id': layer['id'], 'file': layer['file'],
                           'was': layer.get('overlay')} for layer in layers]}

    def _check_owner(self, directory: str) -> None:
        """Refuse to change the disks that others may have named."""
        if not self.options.forget:
            self.place.check_owner(directory, 'do this as that user, make it '
                                   'yours (chown) if you know what is in it, '
                                   + FORGET)

    def _change(self, image_tool: QemuImg, manifest: Json,
                layers: List[Json]) -> None:
        """Change the disks."""
        if manifest['disks']['mode'] != 'external':
            for layer in layers:
                self._delete_internal(image_tool, layer)
            return
        self.merging.begin()
        for layer in layers:
            self.signals.check()
            if not layer['merged']:
                self.merging.merge(layer, layer['above'], self.signals.check)
            self.merging.settle(layer)
        self.merging.end()

    def _plan(self, image_tool: QemuImg, manifest: Json,
              again: bool) -> List[Json]:
        """The disks that are to be changed, all of which can be."""
        mode = manifest['disks']['mode']
        layers: List[Json] = (manifest['disks']['list'] if mode != 'none'
                              else [])
        forget = self.options.forget
        if layers and self.vm is None and not forget:
            image_tool.need('if the VM is off')
        others = (store.neighbours(self.place, skip_damaged=forget)
                  if layers else [])
        self.merging = Merging(self.place, self.place.deleting, layers, others,
                               self.vm, image_tool, self.progress,
                               self.options.restored_gone)
        if self.vm is not None and (forget or mode == 'external'):
            self.merging.tidy()
        if forget:
            if mode == 'external':
                self.merging.begin()
                self.merging.forget()
                self.merging.end()
            return []
        if layers:
            self._check_original(manifest, again)
        self._check_foreign(layers)
        if mode != 'external':
            for layer in layers:
                self._check_internal(layer)
            return layers
        self._check_unfinished(layers)
        layers = [layer for layer in layers
                  if not self.merging.gone(layer)]
        for layer in layers:
            layer['merged'] = again and self.merging.merged(layer)
            if layer['merged']:
                continue
            layer['above'] = self.merging.check(layer)
            if self.merging.noted(layer) is None and not store.fits(layer):
                raise Refused(f'{layer["file"]} was written to after the '
                              f'snapshot: {layer["overlay"]} does not fit it '
                              f'any more; keep both, {FORGET}')
        return layers

    def _check_original(self, manifest: Json, again: bool) -> None:
        """Refuse to change the disks of another, which would be useless."""
        folder = self.place.deleting if again else self.place.path
        if self.place.is_copy(folder, manifest):
            first = manifest['disks']['place']['path']
            raise Refused(
                f'{folder} is a copy of {first}, whose disks would change: '
                f'{FORGET[3:]}; if it is no copy, but was put here instead of '
                f'the other, take "place" out of its {store.MANIFEST} before')

    def _check_unfinished(self, layers: List[Json]) -> None:
        """Refuse to change what is to be undone first."""
        for place, disk in store.unfinished(self.place):
            for layer in layers:
                if _is_on(disk['file'], layer['overlay']):
                    raise Refused(f'{place}, which was not finished, is on '
                                  f'{layer["overlay"]}: undo it first, with '
                                  '"delete --partial"')
        for path, content in self.merging.others:
            if store.is_deleting(path) and any(
                    _is_on(one['file'], other['overlay'])
                    for layer in layers for disk in store.overlays(content)
                    for one, other in ((layer, disk), (disk, layer))):
                raise Refused(f'{content["name"]} is half deleted: delete it '
                              'first')

    def _check_foreign(self, layers: List[Json]) -> None:
        """Refuse what a manifest must be told of that is not ours to write."""
        for path, content in self.merging.others:
            if 'foreign' in content and any(
                    blockjobs.same_file(disk['file'],
                                        layer.get('overlay', layer['file']))
                    for layer in layers for disk in store.overlays(content)):
                raise Refused(f'{path} names a disk that this would change, '
                              'and is another user\'s: have it deleted '
                              f'before, {FORGET}')

    def _check_internal(self, layer: Json) -> None:
        """Refuse if an internal snapshot cannot be deleted from here."""
        if self.vm is None:
            self.merging.image_tool.check_rights(layer['file'])
            self.merging.probe(layer['file'])
            self.merging.check_others(layer['file'], rewriting=layer)
        elif not any(blockjobs.same_file(disk['file'], layer['file'])
                     for disk in disks.writable(self.vm)):
            raise Refused(f'the VM at {self.vm.address} does not write to '
                          f'{layer["file"]}: delete what was taken later '
                          'before, or, if its own VM is off, leave out --qmp')

    def _delete_internal(self, image_tool: QemuImg, layer: Json) -> None:
        self.signals.check()
        name, disk = self.place.name, layer['file']
        self.progress.step(f'delete internal snapshot of {disk}')
        if self.vm is not None:
            disks.delete_internal(self.vm, layer, name)
        else:
            self.merging.rewrite(
                layer, lambda: image_tool.delete_internal(disk, name))
