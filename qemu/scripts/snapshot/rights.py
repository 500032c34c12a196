# SPDX-License-Identifier: GPL-2.0-or-later

"""
Whose files are, and what root does with those of others.  An image that
another user may write to can name any other file as a part of it, and what is
in a directory of theirs they can exchange at any time.  So root does there,
with their rights, what they could have done themselves.
"""

import contextlib
import os
import pwd
import stat
from typing import Iterator, List, NamedTuple, Optional, Union

from .errors import Refused


NOGROUP = 65534


class User(NamedTuple):
    """Another user than root."""
    uid: int
    gid: int
    groups: List[int]


def _may_switch() -> bool:
    """Whether we are root, and not in a container that forbids this."""
    if os.geteuid() != 0:
        return False
    try:
        os.setgroups(os.getgroups())
    except OSError:
        return False
    return True


def user(uid: int, gid: int, groups: List[int]) -> Optional[User]:
    """Who it is, if it is somebody else that we can act as."""
    if uid in (os.geteuid(), 0) or not _may_switch():
        return None
    return User(uid, gid, groups)


def owner_of(file: Union[str, int]) -> Optional[User]:
    """Whose a file is, if it is somebody's that we can act as."""
    uid = os.stat(file).st_uid
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        # Not the file's group, which may be one that its owner is not in
        return user(uid, NOGROUP, [])
    return user(uid, entry.pw_gid,
                os.getgrouplist(entry.pw_name, entry.pw_gid))


@contextlib.contextmanager
def acting_as(who: Optional[User]) -> Iterator[None]:
    """Open and change files with the rights of another; None: with ours."""
    if who is None:
        yield
        return
    gid, groups = os.getegid(), os.getgroups()
    try:
        os.setgroups(who.groups)
        os.setegid(who.gid)
        os.seteuid(who.uid)
        yield
    finally:
        os.seteuid(0)
        os.setegid(gid)
        os.setgroups(groups)


def is_ours(uid: int) -> bool:
    """Whether we do what is written in a file of this user."""
    return uid in (0, os.geteuid())


def check_ours(path: str, owners: List[int], instead: str = '') -> None:
    """Refuse to do what is written in a file, if others may have done so.

    @owners: of the very file that was read; that of its directory is added.
    """
    directory = os.path.dirname(path)
    for name, uid in [*((path, uid) for uid in owners),
                      (directory, os.lstat(directory).st_uid),
                      (directory, os.stat(directory).st_uid)]:
        if not is_ours(uid):
            raise Refused(f'{name} belongs to user {uid}, not to you: '
                          + (instead or 'do this as that user, or make it '
                             'yours (chown) if you know what is in it'))


@contextlib.contextmanager
def folder(path: str) -> Iterator[int]:
    """A directory by its descriptor: the path may get another meaning."""
    found = os.lstat(path)
    # One of ours is a snapshot that was moved elsewhere
    is_link = stat.S_ISLNK(found.st_mode) and is_ours(found.st_uid)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
                 | (0 if is_link else os.O_NOFOLLOW))
    try:
        yield fd
    finally:
        os.close(fd)


def open_image(path: str) -> int:
    """Open a file or a host device for reading; OSError if it is neither.

    Others may be put there by somebody who tries to have us wait for ever.
    """
    def check(found: os.stat_result) -> None:
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode)):
            raise OSError(f'{path} is neither a file nor a block device')
    # To open others may have effects
    check(os.stat(path))
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        check(os.fstat(fd))
    except OSError:
        os.close(fd)
        raise
    return fd
