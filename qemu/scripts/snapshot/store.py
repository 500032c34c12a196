# SPDX-License-Identifier: GPL-2.0-or-later

"""
Where snapshots are kept.  DIR/NAME/ with a manifest.json is a snapshot, and
nothing else is: one that is being made is DIR/.NAME.partial/, one that is
being deleted DIR/.NAME.deleting/, and each becomes the other by one rename.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from . import rights
from .errors import Refused, SnapshotError


Json = Dict[str, Any]

MANIFEST = 'manifest.json'
JOURNAL = 'journal.json'
NOTES = 'merged.json'
IMAGE = 'ram'
LOCK = 'lock'
FORMAT = 'qemu-background-snapshot'
VERSION = 1
CHUNK = 4 << 20
NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9._+-]{0,99}')
SHAPES: List[Tuple[str, Dict[str, type]]] = [
    ('', {'name': str, 'created': str, 'vm': dict, 'qemu': dict,
          'command': dict}),
    ('image', {'mapped': bool, 'channels': int, 'direct': bool}),
    ('disks', {'mode': str, 'list': list}),
]


def sync(path: str) -> None:
    """Have a file or a directory survive a crash of the host."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path: str, content: Json) -> None:
    """Replace a file at once, and for good."""
    directory, name = os.path.split(path)
    temporary = name + '.new'
    with rights.folder(directory) as fd:
        def begin() -> int:
            # There may be secrets in the VM's command line
            return os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY,
                           0o600, dir_fd=fd)
        try:
            new = begin()
        except FileExistsError:
            # By one who was killed, or who would have us write elsewhere
            os.unlink(temporary, dir_fd=fd)
            new = begin()
        with open(new, 'w', encoding='utf-8') as file:
            json.dump(content, file, indent=2)
            file.write('\n')
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, name, src_dir_fd=fd, dst_dir_fd=fd)
        os.fsync(fd)


def read_json(path: str, owners: Optional[List[int]] = None) -> Json:
    """The object in a file; SnapshotError if there is none.

    @owners: gets whose it is, of the very file that was read.  Without, it is
    refused if it is somebody else's.
    """
    found: List[int] = []
    try:
        # It may be somebody's who tries to have us wait, or read another
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(fd, encoding='utf-8') as file:
            state = os.fstat(fd)
            if not stat.S_ISREG(state.st_mode):
                raise SnapshotError(f'{path} is no file')
            found.append(state.st_uid)
            content = json.load(file)
    except (OSError, ValueError) as problem:
        raise SnapshotError(f'cannot read {path}: {problem}') from problem
    if not isinstance(content, dict):
        raise SnapshotError(f'{path} is not a JSON object')
    if owners is None:
        rights.check_ours(path, found)
    else:
        owners += found
    return content


def sha256(path: str, on_chunk: Callable[[int], None]) -> str:
    """The checksum of a file, as sha256sum has it."""
    digest = hashlib.sha256()
    done = 0
    with open(path, 'rb', buffering=0) as file:
        while True:
            data = file.read(CHUNK)
            if not data:
                return digest.hexdigest()
            digest.update(data)
            # The VM needs the page cache more than a finished image does
            os.posix_fadvise(file.fileno(), done, len(data),
                             os.POSIX_FADV_DONTNEED)
            done += len(data)
            on_chunk(done)


def file_state(path: str) -> Json:
    """What tells later that a file was not written to."""
    found = os.stat(path)
    if stat.S_ISBLK(found.st_mode):
        return {}  # A host device has no time of its last write
    return {'size': found.st_size, 'mtime-ns': found.st_mtime_ns}


def fits(disk: Json) -> bool:
    """Whether nobody has written to a snapshot's disk since it was taken."""
    return all(disk.get(key) == value
               for key, value in file_state(disk['file']).items())


def in_dev(folder: str) -> bool:
    """Whether what is put there is gone with the host's next start."""
    return (os.path.realpath(folder) + '/').startswith('/dev/')


def like(fd: int, disk: str, owner: bool = False) -> None:
    """Let nobody read an image who cannot read the disk that it is of.

    @fd: the very image, since its name may be somebody else's to choose.
    """
    found = os.stat(disk)
    plain = stat.S_ISREG(found.st_mode)
    os.fchmod(fd, stat.S_IMODE(found.st_mode) & 0o666 if plain else 0o600)
    if owner and plain and os.geteuid() == 0:
        # Not all file systems, nor namespaces, let root do so
        with contextlib.suppress(OSError):
            os.fchown(fd, found.st_uid, found.st_gid)


class Snapshot:
    """The place of one snapshot, whether it exists or not."""

    def __init__(self, path: str):
        self.path = os.path.abspath(path)
        self.directory, self.name = os.path.split(self.path)
        if not NAME.fullmatch(self.name):
            raise Refused(f'{self.name!r} is no name for a snapshot: letters, '
                          'digits and ._+- are, up to 100')
        self.partial = os.path.join(self.directory, f'.{self.name}.partial')
        self._lock = -1
        self._owners: List[int] = []
        self.deleting = os.path.join(self.directory, f'.{self.name}.deleting')

    def __str__(self) -> str:
        return self.path

    # The whole snapshot

    def exists(self) -> bool:
        """Whether it is there and whole."""
        return os.path.exists(os.path.join(self.path, MANIFEST))

    def read(self) -> Json:
        """Its manifest."""
        if not self.exists():
            raise Refused(f'there is no snapshot {self.path}')
        manifest = parse(os.path.join(self.path, MANIFEST), self._owners)
        if manifest['name'] != self.name:
            raise SnapshotError(
                f'{self.path} was made as {manifest["name"]!r}: if it was '
                'renamed, rename it back; if it is a copy, keep it elsewhere')
        return manifest

    def check_owner(self, directory: str, instead: str) -> None:
        """Refuse if others may have written what was read, if anything was.

        @directory: where it was.
        """
        rights.check_ours(os.path.join(directory, MANIFEST), self._owners,
                          instead)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Nobody else deletes it meanwhile, or restores from it."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY
                         | os.O_CLOEXEC)
        except OSError as problem:
            raise Refused(f'there is no snapshot {self.path}') from problem
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            # It may have been renamed while we waited
            if not os.path.exists(self.path) or not os.path.samestat(
                    os.fstat(fd), os.stat(self.path)):
                raise Refused(f'{self.path} has just been deleted')
            yield
        finally:
            os.close(fd)

    def identity(self) -> Json:
        """What tells it from a copy, while it is made."""
        return {'path': self.path, 'inode': os.stat(self.partial).st_ino}

    def is_copy(self, folder: str, manifest: Json) -> bool:
        """Whether there is, or was, another one with the same disks.

        @folder: where it is now.  It may have been renamed, or be mounted
        elsewhere.
        """
        made = manifest['disks'].get('place')
        if made is None:
            return False
        if os.path.exists(made['path']):
            if os.path.samefile(made['path'], folder):
                return False
            with contextlib.suppress(SnapshotError):
                other = parse(os.path.join(made['path'], MANIFEST), [])
                if other['disks'].get('place') != made:
                    # Another one, since this was moved
                    return bool(os.stat(folder).st_ino != made['inode'])
            return True
        home, name = os.path.split(made['path'])
        if folder == self.deleting and name == self.name and \
                os.path.isdir(home) and \
                os.path.samefile(home, self.directory):
            return False  # Where it was made, and being deleted
        return bool(os.stat(folder).st_ino != made['inode'])

    def write(self, manifest: Json) -> None:
        """Replace its manifest."""
        write_json(os.path.join(self.path, MANIFEST), manifest)

    # While it is made

    def begin(self, journal: Json, owner: Optional[Tuple[int, int]]) -> None:
        """Claim the name.  Two who try get one success."""
        try:
            os.mkdir(self.partial, 0o700)
        except FileExistsError:
            raise Refused(self.unfinished()) from None
        except OSError as problem:
            raise Refused(f'cannot write to {self.directory}: '
                          f'{problem}') from problem
        try:
            if owner is not None and os.geteuid() == 0 and owner[0] != 0:
                # QEMU may write the image, but none of what we go by
                with rights.folder(self.partial) as fd:
                    os.fchmod(fd, 0o711)
                    image = os.open(IMAGE, os.O_CREAT | os.O_EXCL
                                    | os.O_WRONLY, 0o600, dir_fd=fd)
                    try:
                        os.fchown(image, *owner)
                    finally:
                        os.close(image)
            self.lock(self.partial)
            self.note(journal)
            sync(self.directory)
        except OSError as problem:
            self.abandon()
            raise Refused(f'cannot write to {self.directory}: '
                          f'{problem}') from problem

    def unfinished(self) -> str:
        """What to do about a partial snapshot."""
        return (f'{self.partial} is of a "create" that runs or was killed; '
                'in the latter case, "delete --partial" undoes it')

    def lock(self, directory: str) -> None:
        """Keep others away from a partial or half deleted snapshot."""
        # Until the program ends, however that may be
        with rights.folder(directory) as fd:
            self._lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
                                 | os.O_NOFOLLOW, 0o600, dir_fd=fd)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(f'another qemu-snapshot is at work in {directory}'
                          ) from None

    def note(self, journal: Json) -> None:
        """Write down how to undo what comes next, before it comes."""
        write_json(os.path.join(self.partial, JOURNAL), journal)

    def journal(self, owners: Optional[List[int]] = None) -> Optional[Json]:
        """What was written down; None if nothing was.

        @owners: as for read_json().
        """
        path = os.path.join(self.partial, JOURNAL)
        if not os.path.exists(path):
            return None
        try:
            journal = read_json(path, owners)
        except SnapshotError as problem:
            raise Refused(str(problem)) from problem
        if journal.get('version') != VERSION:
            raise Refused(f'{path} is of another version of this program')
        return journal

    def commit(self, manifest: Json) -> None:
        """Make it a snapshot: all or nothing."""
        write_json(os.path.join(self.partial, MANIFEST), manifest)
        sync(self.partial)
        os.rename(self.partial, self.path)
        try:
            sync(self.directory)
        except OSError:
            os.rename(self.path, self.partial)
            raise
        # From here on it is one, with these or without
        with contextlib.suppress(OSError):
            for name in JOURNAL, LOCK:
                os.unlink(os.path.join(self.path, name))

    def abandon(self) -> None:
        """Remove what there is of a partial one."""
        self._remove(self.partial, JOURNAL)

    # While it is deleted

    def condemned(self) -> Optional[Json]:
        """The manifest of a half deleted one; None if all is done."""
        path = os.path.join(self.deleting, MANIFEST)
        return parse(path, self._owners) if os.path.exists(path) else None

    def remove_image(self, name: str) -> None:
        """Remove the image of a half deleted one, if it is there."""
        with rights.folder(self.deleting) as fd, \
                contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=fd)

    def remove(self) -> None:
        """Remove a half deleted one."""
        self._remove(self.deleting, MANIFEST)

    def _remove(self, directory: str, what: str) -> None:
        """Remove a directory; once the file @what is gone, that is all."""
        with rights.folder(directory) as fd:
            for entry in os.scandir(fd):
                if entry.is_dir(follow_symlinks=False):
                    continue  # Somebody else's, for the end
                if entry.name not in (what, NOTES, LOCK):
                    os.unlink(entry.name, dir_fd=fd)
            os.fsync(fd)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(what, dir_fd=fd)
            os.fsync(fd)
        if self._lock >= 0:
            # NFS keeps files that somebody has open
            os.close(self._lock)
            self._lock = -1
        shutil.rmtree(directory)


def parse(path: str, owners: Optional[List[int]] = None) -> Json:
    """A manifest, if it is one that we understand.

    @owners: as for read_json().
    """
    manifest = read_json(path, owners)
    if manifest.get('format') != FORMAT:
        raise SnapshotError(f'{path} is not the manifest of a snapshot')
    if manifest.get('version') != VERSION:
        raise SnapshotError(f'{path} has version {manifest.get("version")}, '
                            f'this program knows {VERSION}')
    for where, shape in SHAPES:
        check_shape(path, where, manifest, shape)
    image, disks = manifest['image'], manifest['disks']
    if 'uri' not in image:
        check_shape(path, 'image', manifest, {'file': str, 'size': int})
    if 'file' in image:
        check_shape(path, 'image', manifest, {'file': str})
        if image['file'] != os.path.basename(image['file']):
            raise SnapshotError(f'{path} names an image elsewhere')
    if manifest['command']:
        check_shape(path, 'command', manifest,
                    {'argv': list, 'cwd': str, 'binary': str})
    shape = {'id': str, 'file': str, 'format': str, 'chain': list,
             'virtual-size': int}
    if disks['mode'] == 'external':
        shape['overlay'] = str
    if 'place' in disks:
        check_shape(path, 'place', disks, {'path': str, 'inode': int})
    for disk in disks['list']:
        check_shape(path, 'disk', {'disk': disk}, shape)
    return manifest


def check_shape(path: str, where: str, manifest: Json,
                shape: Dict[str, type]) -> None:
    """Raise unless there is all that will be used of one part."""
    part = manifest.get(where) if where else manifest
    for key, kind in shape.items():
        if not isinstance(part, dict) or not isinstance(part.get(key), kind) \
                or kind is list and not part[key] and key != 'list':
            raise SnapshotError(f'{path} is damaged: no {key!r}'
                                + (f' in {where!r}' if where else ''))


def snapshots(directory: str) -> Iterator[Snapshot]:
    """All whole snapshots of a directory."""
    for name in sorted(os.listdir(directory)):
        # Others are copies that somebody has made
        if NAME.fullmatch(name):
            place = Snapshot(os.path.join(directory, name))
            if place.exists():
                yield place


def neighbours(place: Snapshot,
               skip_damaged: bool = False) -> List[Tuple[str, Json]]:
    """Paths and contents of all other manifests of a directory.

    Those that are half deleted, too: they name disks that will change.  Those
    of other users are 'foreign': they may keep us from something, no more.
    """
    paths = [other.path for other in snapshots(place.directory)]
    paths += [Snapshot(os.path.join(place.directory, name)).deleting
              for name in leftovers(place.directory, 'deleting')]
    found = []
    for folder in paths:
        path = os.path.join(folder, MANIFEST)
        if folder in (place.path, place.deleting) or \
                not os.path.exists(path):
            continue
        try:
            owners = [os.lstat(folder).st_uid]
            content = parse(path, owners)
            if not all(map(rights.is_ours, owners)):
                content['foreign'] = True
            found.append((path, content))
        except SnapshotError as problem:
            if _is_closed(problem):
                continue  # As those whose directory is closed to us
            if not skip_damaged:
                raise SnapshotError(f'{problem}: repair it, or remove '
                                    f'{folder}') from problem
    return found


def is_deleting(manifest: str) -> bool:
    """Whether what neighbours() has returned is of a half deleted one."""
    return os.path.basename(os.path.dirname(manifest)).startswith('.')


def overlays(content: Json) -> List[Json]:
    """The disks of a manifest that have overlays."""
    layers: List[Json] = content['disks']['list']
    return layers if content['disks']['mode'] == 'external' else []


def unfinished(place: Snapshot) -> Iterator[Tuple[str, Json]]:
    """Path and disk of each that an unfinished snapshot beside it names."""
    for name in leftovers(place.directory, 'partial'):
        other = Snapshot(os.path.join(place.directory, name))
        try:
            journal = other.journal([]) or {}
        except Refused as problem:
            if _is_closed(problem.__cause__):
                continue
            raise
        for disk in journal.get('disks', []):
            yield other.partial, disk


def _is_closed(problem: Optional[BaseException]) -> bool:
    """Whether a file of others could not be read, but by them."""
    return problem is not None and isinstance(problem.__cause__,
                                              PermissionError)


@contextlib.contextmanager
def alone(directory: str) -> Iterator[None]:
    """Nobody else changes disks that the snapshots of a directory name."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as problem:
        raise Refused(f'cannot read {directory}: {problem}') from problem
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise Refused('another qemu-snapshot deletes a snapshot in '
                      f'{directory}') from None
    finally:
        os.close(fd)


def leftovers(directory: str, kind: str) -> List[str]:
    """Names of those that are 'partial' or 'deleting'."""
    return [found.group(1) for found in
            (re.fullmatch(rf'\.({NAME.pattern})\.{kind}', name)
             for name in sorted(os.listdir(directory))) if found]
