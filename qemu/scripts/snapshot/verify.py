# SPDX-License-Identifier: GPL-2.0-or-later

"""
verify and list: look at snapshots without starting a VM.
"""

import argparse
import os
import struct
from functools import partial
from typing import Any, Callable, Dict, List

from . import rights, store
from .errors import SnapshotError
from .images import QemuImg, analyze, base_of
from .progress import Progress
from .signals import Signals


Json = Dict[str, Any]

MAGIC, STREAM_VERSION = b'QEVM', 3


class Verify:
    """Looks for whatever could keep a snapshot from being restored."""

    def __init__(self, options: argparse.Namespace, progress: Progress):
        self.options = options
        self.progress = progress
        self.place = store.Snapshot(options.snapshot)
        self.manifest = self.place.read()
        self.image_tool = QemuImg(options.qemu_img,
                                  self.manifest['command'].get('binary'))
        self.problems: List[str] = []
        self.skipped: List[str] = []
        self.signals = Signals()

    def run(self) -> Json:
        """Returns problems, and what could not be looked at."""
        try:
            self._image()
            mode = self.manifest['disks']['mode']
            for disk in self.manifest['disks']['list']:
                if mode == 'none':
                    self.skipped.append(f'disk {disk["id"]}: it is not part '
                                        'of the snapshot')
                    continue
                self._try(f'disk {disk["id"]}: ',
                          partial(self._disk, disk, mode))
        finally:
            self.progress.end()
        return {'name': self.place.name, 'problems': self.problems,
                'skipped': self.skipped}

    def _try(self, what: str, check: Callable[[], None]) -> bool:
        try:
            check()
            return True
        except SnapshotError as problem:
            if problem.exit_code == 130:
                raise
            self.problems.append(f'{what}{problem}')
        except OSError as problem:
            self.problems.append(f'{what}{problem}')
        return False

    # The image

    def _image(self) -> None:
        image = self.manifest['image']
        if 'file' not in image:
            self.skipped.append(f'image: it went to {image["uri"]}')
            return
        path = os.path.join(self.place.path, image['file'])
        if not self._try('image: ', lambda: self._header(path)):
            return
        if self.options.quick:
            self.skipped.append('image: its contents (--quick)')
            return
        self._try('image: ', lambda: self._checksum(path))
        self.progress.step('scripts/analyze-migration.py')
        self._try('image: ', lambda: analyze(path, image['mapped'],
                                             self.signals.check))
        if image['mapped']:
            self.skipped.append('image: how RAM is laid out (scripts/analyze-'
                                'migration.py does not know mapped-ram)')

    def _header(self, path: str) -> None:
        size = os.path.getsize(path)
        if size != self.manifest['image']['size']:
            raise SnapshotError(f'its size is {size}, it was '
                                f'{self.manifest["image"]["size"]}')
        with open(rights.open_image(path), 'rb') as file:
            magic, version = struct.unpack('>4sI', file.read(8))
        if magic != MAGIC or version != STREAM_VERSION:
            raise SnapshotError('it is no migration stream')

    def _checksum(self, path: str) -> None:
        image = self.manifest['image']
        if 'sha256' not in image:
            self.skipped.append('image: it has no checksum')
            return
        self.progress.step('checksum of the image')

        def on_chunk(done: int) -> None:
            self.progress.bar(done / image['size'], 'checksum')
            self.signals.check()
        if store.sha256(path, on_chunk) != image['sha256']:
            raise SnapshotError('its contents have changed: the checksum is '
                                'another')

    # Disks

    def _disk(self, disk: Json, mode: str) -> None:
        path = disk['file']
        if mode == 'external':
            now = store.file_state(path)
            changed = [key for key, value in now.items()
                       if disk.get(key) != value]
            if changed:
                raise SnapshotError(f'{path} was written to after the '
                                    f'snapshot ({", ".join(changed)})')
        below = base_of(path)
        if below is not None and not os.path.exists(below):
            raise SnapshotError(f'{path} is an overlay of {below}, which is '
                                'not there')
        if not self.image_tool.available():
            self.skipped.append(f'disk {disk["id"]}: what is in {path} '
                                '(there is no qemu-img)')
            return
        info = self.image_tool.info(path)
        if disk['format'] != 'raw' and info['format'] != disk['format']:
            raise SnapshotError(f'{path} has the format {info["format"]}, it '
                                f'was {disk["format"]}')
        if mode == 'internal' and self.place.name not in [
                s['name'] for s in info.get('snapshots', [])]:
            raise SnapshotError(f'{path} has no internal snapshot '
                                f'{self.place.name}')
        if mode == 'external' and disk['format'] == 'qcow2':
            if info['virtual-size'] != disk['virtual-size']:
                raise SnapshotError(f'{path} has been resized')
        if disk['format'] == 'qcow2' and not self.options.quick:
            self.progress.step(f'qemu-img check {path}')
            self.image_tool.check(path)
        self.signals.check()


def list_all(options: argparse.Namespace, _progress: Progress) -> Json:
    """list: the snapshots of a directory."""
    directory = os.path.abspath(options.directory)
    try:
        found, damaged = [], []
        for place in store.snapshots(directory):
            try:
                found.append(describe(place, place.read()))
            except SnapshotError as problem:
                damaged.append({'name': place.name, 'problem': str(problem)})
        return {'snapshots': found, 'damaged': damaged,
                'partial': store.leftovers(directory, 'partial'),
                'deleting': store.leftovers(directory, 'deleting')}
    except OSError as problem:
        raise SnapshotError(f'cannot read {directory}: {problem}'
                            ) from problem


def describe(place: store.Snapshot, manifest: Json) -> Json:
    """What "list" tells of a snapshot."""
    image = manifest['image']
    allocated = None
    if 'file' in image:
        path = os.path.join(place.path, image['file'])
        # With mapped-ram, most of the size may be holes
        allocated = (os.stat(path).st_blocks * 512
                     if os.path.exists(path) else 0)
    return {
        'name': manifest['name'], 'path': place.path,
        'created': manifest['created'], 'vm': manifest['vm'],
        'qemu': manifest['qemu'],
        'format': 'mapped-ram' if image['mapped'] else 'stream',
        'allocated': allocated, 'mode': manifest['disks']['mode'],
        'disks': [{key: disk[key] for key in ('id', 'file', 'overlay')
                   if key in disk} for disk in manifest['disks']['list']],
    }
