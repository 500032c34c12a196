# SPDX-License-Identifier: GPL-2.0-or-later

"""
Records of overlays, for whoever changes what they are on: wherever they are,
and whether they can be seen now or not.
"""

import os
from typing import Any, Dict, Iterable, List, Optional

from . import store
from .errors import SnapshotError


# In a snapshot: the disks of VMs that were restored from it
RESTORED = 'restored.json'


def beside(disk: str) -> str:
    """Where it is recorded which overlays a disk has in other places."""
    folder, name = os.path.split(disk)
    return os.path.join(folder, f'.{name}.overlays')


def files(record: str, all_of_them: bool = True, gone: str = '') -> List[str]:
    """The overlays that there are; may raise if that cannot be told.

    @gone: how to say that what cannot be seen is gone.
    """
    found = []
    for path, inode in _read(record).items():
        if os.path.exists(path):
            found.append(path)
        elif all_of_them and _is_hidden(path, inode):
            raise SnapshotError(
                f'{path} cannot be seen, {os.path.dirname(path)} is not the '
                'directory that it was: have it be there, or, if the former '
                f'is gone for good, {gone or f"take it out of {record}"}')
    return found


def add(record: str, more: Iterable[str]) -> None:
    """Record overlays; those that are gone are forgotten."""
    known = {path: inode for path, inode in _read(record).items()
             if os.path.lexists(path) or _is_hidden(path, inode)}
    known.update((path, _inode(os.path.dirname(path))) for path in more)
    _write(record, known)


def replace(record: str, overlay: str, above: Optional[str]) -> None:
    """An overlay, if it is recorded, goes; what was on it comes instead."""
    known = _read(record)
    if overlay not in known:
        return
    del known[overlay]
    if above is not None:
        known[above] = _inode(os.path.dirname(above))
    _write(record, known)


def _inode(folder: str) -> Optional[int]:
    """What a directory is not, while another file system is not mounted."""
    try:
        return os.stat(folder).st_ino
    except FileNotFoundError:
        return None


def _is_hidden(path: str, inode: Optional[int]) -> bool:
    """Whether a file that is not there need not be gone."""
    return _inode(os.path.dirname(path)) != inode


def _read(record: str) -> Dict[str, Any]:
    if not os.path.exists(record):
        return {}
    # It only keeps us from something, whosever it is
    known = store.read_json(record, []).get('files')
    if isinstance(known, list):
        # Of an earlier version, to which what is not there was gone
        known = {path: _inode(os.path.dirname(path)) for path in known}
    if not isinstance(known, dict):
        raise SnapshotError(f"{record} is damaged: no 'files'")
    return known


def _write(record: str, known: Dict[str, Any]) -> None:
    if known:
        store.write_json(record, {'files': known})
    elif os.path.exists(record):
        os.unlink(record)
