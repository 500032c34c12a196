"""What is measured: a row is a situation, a variant a way to save its RAM.

SPDX-License-Identifier: GPL-2.0-or-later
"""
from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Optional, Union

from lab import env, snapshot
from lab.format import STREAM, Format


@dataclass
class Writer:
    """Writes to pages of @area_mb MiB.

    rate: page writes a second, 0 for as many as the guest can;
    stride: pages from one write to the next, 0 for random order;
    fill_mb: MiB besides that hold data, and are not touched.
    """
    rate: int = 0
    stride: int = 0
    area_mb: int = 512
    fill_mb: int = 0


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
class Variant:
    """A way to save a guest's RAM.

    binary: which QEMU; how: a background snapshot (live), a migration of a VM
    that is stopped, snapshot-save into the VM's disk (savevm), or no QEMU at
    all, but dd of as many bytes;
    trap: its snapshot-write-trap, None if unmodified;
    format: see lab/format.py; of dd, only whether it is direct.
    """
    name: str
    binary: Path
    how: str = 'live'
    trap: Optional[str] = None
    format: Format = STREAM


STOCK = Variant('stock', env.STOCK)
TRAPS = [Variant(trap, env.QEMU, trap=trap) for trap in snapshot.TRAPS]


def _mapped(base: Variant, channels: int, direct: bool = False) -> Variant:
    """@base with mapped-ram, and with multifd if there are channels."""
    name = (f'{base.name}-mapped' + (f'-{channels}' if channels else '')
            + ('-direct' if direct else ''))
    return Variant(name, base.binary, base.how, base.trap,
                   Format(mapped=True, channels=channels, direct=direct))


_STOPPED = Variant('stopped', env.STOCK, 'stopped')
FORMATS = [
    STOCK,
    _STOPPED, _mapped(_STOPPED, 0), _mapped(_STOPPED, 2),
    _mapped(_STOPPED, 2, True),
    Variant('savevm', env.STOCK, 'savevm'),
    TRAPS[0], *[_mapped(TRAPS[0], channels) for channels in (0, 1, 2, 4)],
    *[_mapped(TRAPS[0], channels, True) for channels in (1, 2, 4)],
    *[_mapped(trap, 2, True) for trap in TRAPS[1:]],
    # At the end: they write as many bytes as the others have.
    Variant('dd', Path('dd'), 'dd'),
    Variant('dd-direct', Path('dd'), 'dd', format=Format(direct=True)),
]
LIVE = [STOCK, *TRAPS]


@dataclass
class Row:
    """A guest that does something, and a destination.

    sink_mb_s: 10^6 bytes a second that a pipe takes, None for a file in the
    page cache; burst_ms: how bursty the pipe is, see lab/sink.py;
    in_tmpfs: whether the file is in /dev/shm instead;
    ram_mb: MiB of the guest;
    buffer_mb: MiB, None for the default;
    thp: whether the guest may have huge pages; cores: those of QEMU, 0: all;
    before_s, after_s: for how long it is watched;
    whole: whether the snapshot ends by itself, not soon after the freeze;
    variants: what the row is measured with;
    default: whether it is measured when no row is asked for.
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
    thp: bool = True
    cores: int = 0
    before_s: int = 3
    after_s: int = 3
    whole: bool = True
    variants: List[Variant] = field(default_factory=lambda: LIVE)
    default: bool = True


def _freezes() -> List[Row]:
    """Guests of several sizes, with and without huge pages; idle or not.

    Those that are idle write to 1 MiB only, to show that they run.
    """
    rows = []
    for size, what, ram_mb, used_mb in (
            ('1g-half', '1 GiB, half of it touched', 1024, 512),
            ('8g-500m', '8 GiB, 500 MB of them touched', 8192, 480),
            ('8g-full', '8 GiB, all with data', 8192, 7400)):
        for thp in (True, False):
            for busy in (False, True):
                # No more than a busy guest can write to in a moment.
                area_mb = min(used_mb, 512) if busy else 1
                rows.append(Row(
                    f'freeze-{size}' + ('' if thp else '-no-thp')
                    + ('-busy' if busy else ''),
                    f'{what}, {"with" if thp else "without"} huge pages, '
                    + ('random page writes at full speed' if busy
                       else 'idle'),
                    Writer(rate=0 if busy else 2000, area_mb=area_mb,
                           fill_mb=used_mb - area_mb),
                    ram_mb=ram_mb, thp=thp, whole=False, after_s=1,
                    default=not busy))
    return rows


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
    Row('one-core', 'random page writes at full speed, file in the page '
        'cache, one core for all of QEMU', Writer(),
        cores=1, before_s=5),
    Row('sequential-fast-file', 'page after page at full speed, file in the '
        'page cache', Writer(stride=1), default=False),
    Row('strided-fast-file', 'every 16th page at full speed, file in the '
        'page cache', Writer(stride=16), default=False),
    Row('throughput', '4 GiB, 3,130 MB of them with data, 2,000 random page '
        'writes a second, file in the page cache or written directly',
        Writer(rate=2000, area_mb=2840), ram_mb=4096, variants=FORMATS),
    *_freezes(),
    Row('touched-256m-of-1g', '256 MiB of 1 GiB touched, 100 random page '
        'writes a second, file in the page cache',
        Writer(rate=100, area_mb=256), after_s=6),
    Row('touched-256m-of-16g', '256 MiB of 16 GiB touched, the same',
        Writer(rate=100, area_mb=256), ram_mb=16384, after_s=6),
    Row('database-slow-sink', 'SQLite commits, 512 MiB of cached data, '
        '60 MB/s', Database(), sink_mb_s=60, before_s=WARM_S, after_s=11,
        default=False),
    Row('database-fast-file', 'SQLite commits, 512 MiB of cached data, file '
        'in the page cache', Database(), before_s=WARM_S, after_s=11),
    Row('database-other-file-system', 'the same, but the file is in tmpfs, '
        'and so not on the file system of the database\'s disk', Database(),
        in_tmpfs=True, before_s=WARM_S, after_s=11),
    Row('keyvalue-slow-sink', 'key-value operations on 512 MiB, 60 MB/s',
        KeyValue(), sink_mb_s=60, before_s=6, after_s=11, default=False),
    Row('keyvalue-fast-file', 'key-value operations on 512 MiB, file in the '
        'page cache', KeyValue(), before_s=6, after_s=11, default=False),
]
VARIANTS = list({v.name: v for row in ROWS for v in row.variants}.values())
