"""A disk with a file system for a guest.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import subprocess
from pathlib import Path

from . import env


def new_ext4(disk: Path, mb: int) -> Path:
    """Make @disk, a qcow2 image of @mb MiB with an empty ext4."""
    raw = disk.with_suffix('.raw')
    with raw.open('wb') as file:
        file.truncate(mb << 20)
    # /sbin is not in everybody's PATH.
    subprocess.run(['/sbin/mkfs.ext4', '-q', '-F', raw], check=True)
    subprocess.run([env.qemu_img(env.QEMU), 'convert', '-f', 'raw',
                    '-O', 'qcow2', raw, disk], check=True)
    raw.unlink()
    return disk
