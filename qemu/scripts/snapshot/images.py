# SPDX-License-Identifier: GPL-2.0-or-later

"""
Programs that read and change disk images and migration streams while no QEMU
does: qemu-img, and scripts/analyze-migration.py.
"""

import ctypes
import json
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, Dict, Optional

from . import rights
from .errors import Refused, SnapshotError


LIBC = ctypes.CDLL(None)
ANALYZER = os.path.join(os.path.dirname(os.path.realpath(__file__)),
                        '..', 'analyze-migration.py')


def _read(path: str, at: int, size: int) -> bytes:
    """Some bytes of an image; fewer if it ends, none if it is not readable."""
    try:
        with open(rights.open_image(path), 'rb') as file:
            file.seek(at)
            return file.read(size)
    except OSError:
        return b''


def _header(path: str) -> Optional[bytes]:
    """The first bytes of a qcow2 image; None if it is none."""
    head = _read(path, 0, 80)
    return head if len(head) == 80 and head[:4] == b'QFI\xfb' else None


def base_of(path: str) -> Optional[str]:
    """The file that backs a qcow2 image, by its header; None if none does."""
    head = _header(path)
    if head is None:
        return None
    offset, length = struct.unpack_from('>QI', head, 8)
    name = _read(path, offset, min(length, 1023)) if offset else b''
    return os.path.join(os.path.dirname(path), os.fsdecode(name)) \
        if name else None


def check_no_internal(path: str) -> None:
    """Raise if a qcow2 image has internal snapshots: a merge loses them."""
    head = _header(path)
    if head is not None and struct.unpack_from('>I', head, 60)[0]:
        raise SnapshotError(f'{path} has internal snapshots, which would be '
                            'lost: delete them before')


def _has_data_file(path: str) -> bool:
    """Whether what a qcow2 image holds is in another file."""
    head = _header(path)
    if head is None or struct.unpack_from('>I', head, 4)[0] < 3:
        return False
    return bool(struct.unpack_from('>Q', head, 72)[0] & 4)


def ours(program: str) -> bool:
    """Whether nobody else decides what a program is, by its real path."""
    path = program
    while True:
        found = os.lstat(path)
        shared = found.st_mode & stat.S_IWOTH and \
            not found.st_mode & stat.S_ISVTX
        if found.st_uid not in (0, os.geteuid()) or shared:
            return False
        if path == '/':
            return True
        path = os.path.dirname(path)


def _die_with_us() -> None:
    """Whoever calls us again is not to find it at work."""
    pr_set_pdeathsig = 1
    LIBC.prctl(pr_set_pdeathsig, signal.SIGKILL)


class QemuImg:
    """qemu-img, from --qemu-img, beside a QEMU binary, or from PATH.

    The binary may be what another user's VM or manifest says.
    """

    def __init__(self, given: Optional[str] = None,
                 beside: Optional[str] = None):
        self._path = given
        if not given and beside:
            neighbour = os.path.realpath(
                os.path.join(os.path.dirname(beside), 'qemu-img'))
            if os.access(neighbour, os.X_OK) and ours(neighbour):
                self._path = neighbour
        self._path = self._path or shutil.which('qemu-img')

    def available(self) -> bool:
        """Whether there is one."""
        return self._path is not None

    def need(self, why: str) -> None:
        """Refuse if there is none."""
        if not self.available():
            raise Refused(f'qemu-img is needed {why}: install it, or name it '
                          'with --qemu-img')

    def _run(self, *arguments: str, accept: int = 0,
             each_second: Callable[[], None] = lambda: None,
             who: Optional[rights.User] = None, fd: int = -1) -> str:
        """@who: with whose rights, instead of ours.  @fd: to be kept open."""
        self.need('here')
        assert self._path is not None
        try:
            # Signals of the terminal are for us: a commit is not to be cut
            # pylint: disable=consider-using-with
            process = subprocess.Popen([self._path, *arguments],
                                       stdin=subprocess.DEVNULL,
                                       stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE, text=True,
                                       start_new_session=True,
                                       preexec_fn=_die_with_us,
                                       pass_fds=(fd,) if fd >= 0 else (),
                                       user=who and who.uid,
                                       group=who and who.gid,
                                       extra_groups=who and who.groups)
        except OSError as problem:
            raise SnapshotError(f'{self._path}: {problem}') from problem
        while True:
            try:
                out, err = process.communicate(timeout=1)
                break
            except subprocess.TimeoutExpired:
                each_second()
        if process.returncode not in (0, accept):
            said = (err.strip() or out.strip()
                    or f'qemu-img {arguments[0]} failed')
            if fd >= 0:
                said = said.replace(f'/dev/fd/{fd}',
                                    os.readlink(f'/dev/fd/{fd}'))
            raise SnapshotError(said)
        return out

    def info(self, path: str) -> Dict[str, Any]:
        """qemu-img info.  Works beside a QEMU that uses the image."""
        info: Dict[str, Any] = json.loads(
            self._run('info', '-U', '--output=json', path))
        return info

    def probe(self, path: str) -> None:
        """Raise if a QEMU has this image open for writing."""
        self._run('info', path)

    def check(self, path: str) -> None:
        """Raise if the metadata of an image is damaged.  Leaks are not."""
        self._run('check', '-q', '-U', '-f', 'qcow2', path, accept=3)

    def is_empty(self, overlay: str) -> bool:
        """Whether there is nothing in an overlay that is not in its base."""
        if self.info(overlay)['format'] != 'qcow2':
            return True  # It is not even an overlay yet
        parts = json.loads(self._run('map', '-U', '--output=json', '-f',
                                     'qcow2', overlay))
        return not any(part['depth'] == 0 and part['present']
                       for part in parts)

    def create(self, fd: int, base: str, base_format: str) -> None:
        """Make a file that we have open a new overlay."""
        self._run('create', '-q', '-f', 'qcow2', '-b', base,
                  '-F', base_format, f'/dev/fd/{fd}', fd=fd)

    def copy_internal(self, path: str, snapshot: str, fd: int) -> None:
        """Copy an internal snapshot out of a disk that nobody uses."""
        self._run('convert', '-f', 'qcow2', '-O', 'qcow2', '-l',
                  f'snapshot.name={snapshot}', path, f'/dev/fd/{fd}', fd=fd,
                  who=rights.owner_of(fd))

    def delete_internal(self, path: str, snapshot: str) -> None:
        """Delete one of a disk that nobody uses, if it is there."""
        info = self.info(path)
        if snapshot in [s['name'] for s in info.get('snapshots', [])]:
            self._run('snapshot', '-d', snapshot, path,
                      who=rights.owner_of(path))

    def check_rights(self, image: str, *bases: str) -> None:
        """Raise if an image's owner may not do to it what is to be done.

        @bases: what is written to as well, if the image is an overlay.
        """
        who = rights.owner_of(image)
        if bases and _has_data_file(image):
            raise SnapshotError(f'{image} names another file that its data is '
                                'in, which no overlay of ours does: find '
                                'out why, or leave it so, with --forget')
        if who is None:
            for base in bases:
                if rights.owner_of(base) is not None and _has_data_file(base):
                    raise SnapshotError(
                        f'{base} is not yours, and names the file that its '
                        'data is in: make it yours (chown) if that is '
                        'right, or leave it so, with --forget')
            return
        with rights.acting_as(who):
            for path in [image, *bases]:
                if not os.access(path, os.R_OK | os.W_OK, effective_ids=True):
                    raise SnapshotError(
                        f'user {who.uid}, whose {image} is, may not write to '
                        f'{path}: give both to one user (chown), have that '
                        'user be in a group that may (usermod -aG), or leave '
                        'them so, with --forget')
            program = shutil.which(self._path or '') or ''
            if not os.access(program, os.X_OK, effective_ids=True):
                raise SnapshotError(
                    f'user {who.uid}, whose {image} is, may not run '
                    f'{self._path}: name another with --qemu-img')

    def commit(self, overlay: str, each_second: Callable[[], None]) -> None:
        """Write an overlay into its base; the overlay stays as it is."""
        self._run('commit', '-q', '-d', '-f', 'qcow2', overlay,
                  each_second=each_second, who=rights.owner_of(overlay))

    def rebase(self, overlay: str, base: str, base_format: str) -> None:
        """Change the name of an overlay's base."""
        self._run('rebase', '-q', '-u', '-f', 'qcow2', '-b', base,
                  '-F', base_format, overlay, who=rights.owner_of(overlay))


def analyze(stream: str, mapped: bool, meanwhile: Callable[[], None]) -> None:
    """Have QEMU's own reader read an image; raise if it cannot.

    Of mapped-ram it knows only the description of the devices, which is the
    last that is written.
    """
    with tempfile.TemporaryFile('w+') as log, subprocess.Popen(
            [sys.executable, ANALYZER, '-f', stream,
             '-d', 'desc' if mapped else 'state'],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
            start_new_session=True) as process:
        try:
            while process.poll() is None:
                meanwhile()
                time.sleep(0.05)
        except BaseException:
            process.kill()
            raise
        if process.returncode:
            log.seek(0)
            words = log.read().strip().splitlines()
            raise SnapshotError('scripts/analyze-migration.py cannot read it: '
                                + (words[-1] if words else 'no reason given'))
