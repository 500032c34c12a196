"""What is measured: a row is a situation, a variant a QEMU and its trap.

SPDX-License-Identifier: GPL-2.0-or-later
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from lab import env


@dataclass
class Row:
    """A guest that writes, and a destination.

    rate: page writes a second, 0 for as many as the guest can;
    stride: pages from one write to the next, 0 for random order;
    sink_mb_s: 10^6 bytes a second that a pipe takes, None for a file in the
    page cache; burst_ms: how bursty the pipe is, see sink.py;
    area_mb, ram_mb: MiB written to, and of the guest;
    buffer_mb: MiB, None for the default.
    """
    name: str
    what: str
    rate: int = 0
    stride: int = 0
    sink_mb_s: Optional[float] = None
    burst_ms: int = 100
    area_mb: int = 512
    ram_mb: int = 1024
    vcpus: int = 1
    buffer_mb: Optional[int] = None


@dataclass
class Variant:
    """A QEMU to measure; trap: its snapshot-write-trap, None if unmodified."""
    name: str
    binary: Path
    trap: Optional[str] = None


ROWS = [
    Row('paced-slow-sink', '2,000 random page writes a second, 60 MB/s',
        rate=2000, sink_mb_s=60),
    Row('full-slow-sink', 'random page writes at full speed, 60 MB/s, room '
        'for all of them in the buffer', sink_mb_s=60, buffer_mb=512),
    Row('paced-fast-file', '2,000 random page writes a second, file in the '
        'page cache', rate=2000),
    Row('full-fast-file', 'random page writes at full speed, file in the '
        'page cache'),
    Row('sequential-fast-file', 'page after page at full speed, file in the '
        'page cache', stride=1),
    Row('strided-fast-file', 'every 16th page at full speed, file in the '
        'page cache', stride=16),
]
STOCK = Variant('stock', env.STOCK)
VARIANTS = [STOCK] + [Variant(trap, env.QEMU, trap) for trap
                      in ('mprotect', 'uffd-signal', 'uffd-thread')]
