"""What is measured: a row is a situation, a variant a QEMU and its trap.

SPDX-License-Identifier: GPL-2.0-or-later
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

from lab import env, snapshot


@dataclass
class Writer:
    """Writes to pages of @area_mb MiB.

    rate: page writes a second, 0 for as many as the guest can;
    stride: pages from one write to the next, 0 for random order.
    """
    rate: int = 0
    stride: int = 0
    area_mb: int = 512


@dataclass
class Database:
    """SQLite on ext4 on a disk commits row after row; its log is in WAL mode.

    cache_mb: MiB that hold data but are not touched meanwhile.
    """
    cache_mb: int = 512


@dataclass
class KeyValue:
    """Gets and puts, half and half, of random keys of a table in memory."""
    table_mb: int = 512


@dataclass
class Row:
    """A guest that does something, and a destination.

    sink_mb_s: 10^6 bytes a second that a pipe takes, None for a file in the
    page cache; burst_ms: how bursty the pipe is, see lab/sink.py;
    in_tmpfs: whether the file is in /dev/shm instead;
    ram_mb: MiB of the guest;
    buffer_mb: MiB, None for the default;
    before_s, after_s: for how long it is watched.
    """
    name: str
    what: str
    load: Union[Writer, Database, KeyValue]
    sink_mb_s: Optional[float] = None
    burst_ms: int = 100
    in_tmpfs: bool = False
    ram_mb: int = 1024
    vcpus: int = 1
    buffer_mb: Optional[int] = None
    before_s: int = 3
    after_s: int = 3


@dataclass
class Variant:
    """A QEMU to measure; trap: its snapshot-write-trap, None if unmodified."""
    name: str
    binary: Path
    trap: Optional[str] = None


# TCG has translated the database after 3 to 5 seconds of it.
WARM_S = 11
ROWS = [
    Row('paced-slow-sink', '2,000 random page writes a second, 60 MB/s',
        Writer(rate=2000), sink_mb_s=60),
    Row('full-slow-sink', 'random page writes at full speed, 60 MB/s, room '
        'for all of them in the buffer', Writer(), sink_mb_s=60,
        buffer_mb=512, before_s=5, after_s=31),
    Row('paced-fast-file', '2,000 random page writes a second, file in the '
        'page cache', Writer(rate=2000)),
    Row('full-fast-file', 'random page writes at full speed, file in the '
        'page cache', Writer(), before_s=5, after_s=31),
    Row('sequential-fast-file', 'page after page at full speed, file in the '
        'page cache', Writer(stride=1)),
    Row('strided-fast-file', 'every 16th page at full speed, file in the '
        'page cache', Writer(stride=16)),
    Row('touched-256m-of-1g', '256 MiB of 1 GiB touched, 100 random page '
        'writes a second, file in the page cache',
        Writer(rate=100, area_mb=256), after_s=6),
    Row('touched-256m-of-16g', '256 MiB of 16 GiB touched, the same',
        Writer(rate=100, area_mb=256), ram_mb=16384, after_s=6),
    Row('database-slow-sink', 'SQLite commits, 512 MiB of cached data, '
        '60 MB/s', Database(), sink_mb_s=60, before_s=WARM_S, after_s=11),
    Row('database-fast-file', 'SQLite commits, 512 MiB of cached data, file '
        'in the page cache', Database(), before_s=WARM_S, after_s=11),
    Row('database-other-file-system', 'the same, but the file is in tmpfs, '
        'and so not on the file system of the database\'s disk', Database(),
        in_tmpfs=True, before_s=WARM_S, after_s=11),
    Row('keyvalue-slow-sink', 'key-value operations on 512 MiB, 60 MB/s',
        KeyValue(), sink_mb_s=60, before_s=6, after_s=11),
    Row('keyvalue-fast-file', 'key-value operations on 512 MiB, file in the '
        'page cache', KeyValue(), before_s=6, after_s=11),
]
STOCK = Variant('stock', env.STOCK)
VARIANTS = [STOCK] + [Variant(trap, env.QEMU, trap)
                      for trap in snapshot.TRAPS]
