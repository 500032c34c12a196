"""What is measured: one row a situation.

SPDX-License-Identifier: GPL-2.0-or-later
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from lab import env


@dataclass
class Row:
    """A guest that writes and a destination.

    rate: random page writes a second, 0 for as many as it can;
    area_mb, ram_mb: MiB written to, and of the guest;
    sink_mb_s: 10^6 bytes a second out of a pipe, None for a file in the page
    cache; buffer: bytes, None for the default.
    """
    name: str
    what: str
    rate: int
    sink_mb_s: Optional[float]
    area_mb: int = 512
    ram_mb: int = 1024
    vcpus: int = 1
    buffer: Optional[int] = None


@dataclass
class Variant:
    """A QEMU to measure; `patched` has the parameters of this series."""
    name: str
    binary: Path
    patched: bool


ROWS = [
    Row('paced-slow-sink', '2,000 random page writes a second, pipe drained '
        'at 60 MB/s', rate=2000, sink_mb_s=60),
]
VARIANTS = [
    Variant('ours', env.QEMU, True),
    Variant('stock', env.STOCK, False),
]
