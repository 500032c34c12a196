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

from .errors import Refused, SnapshotError


Json = Dict[str, Any]

MANIFEST = 'manifest.json'
JOURNAL = 'journal.json'
IMAGE = 'ram'
LOCK = 'lock'
FORMAT = 'qemu-background-snapshot'
VERSION = 1
CHUNK = 4 << 20


def sync(path: str) -> None:
    """Have a file or a directory survive a crash of the host."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path: str, content: Json) -> None:
    """Replace a file at once, and for good."""
    temporary = path + '.new'
    with open(temporary, 'w', encoding='utf-8') as file:
        # There may be secrets in the VM's command line
        os.fchmod(file.fileno(), 0o600)
        json.dump(content, file, indent=2)
        file.write('\n')
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    sync(os.path.dirname(path))


def read_json(path: str) -> Json:
    """The object in a file; SnapshotError if there is none."""
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
    except (OSError, ValueError) as problem:
        raise SnapshotError(f'cannot read {path}: {problem}') from problem
    if not isinstance(content, dict):
        raise SnapshotError(f'{path} is not a JSON object')
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


class Snapshot:
    """The place of one snapshot, whether it exists or not."""

    def __init__(self, path: str):
        self.path = os.path.abspath(path)
        self.directory, self.name = os.path.split(self.path)
        if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9._+-]{0,99}', self.name):
            raise Refused(f'{self.name!r} is no name for a snapshot: letters, '
                          'digits and ._+- are, up to 100')
        self.partial = os.path.join(self.directory, f'.{self.name}.partial')
        self._lock = -1
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
        return parse(os.path.join(self.path, MANIFEST))

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
            if owner is not None and os.geteuid() == 0:
                # QEMU writes into it, whoever it runs as
                os.chown(self.partial, *owner)
            self.lock(self.partial)
            self.note(journal)
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
        self._lock = os.open(os.path.join(directory, LOCK),
                             os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(f'another qemu-snapshot is at work in {directory}'
                          ) from None

    def note(self, journal: Json) -> None:
        """Write down how to undo what comes next, before it comes."""
        write_json(os.path.join(self.partial, JOURNAL), journal)

    def journal(self) -> Json:
        """What was written down."""
        return read_json(os.path.join(self.partial, JOURNAL))

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
        shutil.rmtree(self.partial)


def parse(path: str) -> Json:
    """A manifest, if it is one that we understand."""
    manifest = read_json(path)
    if manifest.get('format') != FORMAT:
        raise SnapshotError(f'{path} is not the manifest of a snapshot')
    if manifest.get('version') != VERSION:
        raise SnapshotError(f'{path} has version {manifest.get("version")}, '
                            f'this program knows {VERSION}')
    for key, kind in (('image', dict), ('disks', dict), ('qemu', dict),
                      ('name', str)):
        if not isinstance(manifest.get(key), kind):
            raise SnapshotError(f'{path} has no {key!r}')
    return manifest


def snapshots(directory: str) -> Iterator[Snapshot]:
    """All whole snapshots of a directory."""
    for name in sorted(os.listdir(directory)):
        path = os.path.join(directory, name)
        if not name.startswith('.') and os.path.exists(
                os.path.join(path, MANIFEST)):
            yield Snapshot(path)


def leftovers(directory: str, kind: str) -> List[str]:
    """Names of those that are 'partial' or 'deleting'."""
    return [found.group(1) for found in
            (re.fullmatch(rf'\.(.+)\.{kind}', name)
             for name in sorted(os.listdir(directory))) if found]
