"""Each write trap with guests at rest and busy, and every way to read a disk.

SPDX-License-Identifier: GPL-2.0-or-later
"""
from typing import Any, Dict, List

from ..scene import Case, acceptance, rounds
from .roundtrip import MIB, Row, slow_pipe

TRAPS = ['uffd-signal', 'mprotect', 'uffd-thread']
GUESTS: Dict[str, Dict[str, Any]] = {
    'static-1cpu': {'vcpus': 1, 'write_mb': 0, 'static_mb': 128},
    'static-4cpu': {'vcpus': 4, 'write_mb': 0, 'static_mb': 128},
    'writer-1cpu': {'vcpus': 1},
    'writer-4cpu': {'vcpus': 4},
}
DISKS: Dict[str, Dict[str, Any]] = {
    'threads': {'aio': 'threads'},
    'native': {'aio': 'native'},
    'io-uring': {'aio': 'io_uring'},
    'iothread': {'aio': 'native', 'iothread': True},
}


def rows() -> List[Row]:
    """For acceptance all combinations, otherwise those of a Latin square.

    That has each trap meet each guest and each disk, and each guest meet as
    many disks as there are traps.
    """
    chosen = []
    for t, trap in enumerate(TRAPS):
        for g, (guest, shape) in enumerate(GUESTS.items()):
            for d, (disk, drive) in enumerate(DISKS.items()):
                if acceptance() or (t + g) % len(DISKS) == d:
                    chosen.append(Row(f'{trap}-{guest}-{disk}', trap=trap,
                                      rounds=rounds(), **shape, **drive))
        chosen.append(Row(f'{trap}-small-buffer', 2, trap=trap,
                          sinks=[slow_pipe], buffer=MIB))
    return chosen


CASES = [Case(row.name, row.run) for row in rows()]
