"""Disks for guests.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import shlex
import subprocess
from pathlib import Path
from typing import Any

from .place import HERE, Place


def new(place: Place, disk: Path, mb: int) -> Path:
    """Make @disk, an empty qcow2 image."""
    _qemu_img(place, 'create', '-q', '-f', 'qcow2', disk, f'{mb}M')
    return disk


def new_overlay(place: Place, frozen: Path, overlay: Path) -> Path:
    """Make a qcow2 overlay for a restored VM, over a frozen disk."""
    place.run(f'rm -f {shlex.quote(str(overlay))}')
    _qemu_img(place, 'create', '-q', '-f', 'qcow2', '-b', frozen,
              '-F', 'qcow2', overlay)
    return overlay


def new_ext4(disk: Path, mb: int) -> Path:
    """Make @disk, a qcow2 image with an empty ext4, here."""
    raw = disk.with_suffix('.raw')
    with raw.open('wb') as file:
        file.truncate(mb << 20)
    # /sbin is not in everybody's PATH.
    subprocess.run(['/sbin/mkfs.ext4', '-q', '-F', raw], check=True)
    _qemu_img(HERE, 'convert', '-f', 'raw', '-O', 'qcow2', raw, disk)
    raw.unlink()
    return disk


def check(place: Place, disk: Path) -> None:
    """Raises if @disk is damaged; clusters that nobody uses are no damage."""
    place.run(f'{shlex.quote(str(place.qemu_img))} check -q '
              f'{shlex.quote(str(disk))} || [ $? = 3 ]')


def contents(disk: Path, at_mb: int, size: int) -> bytes:
    """A part of a disk, which nobody uses, here."""
    raw = disk.with_suffix('.raw')
    _qemu_img(HERE, 'convert', '-f', 'qcow2', '-O', 'raw', disk, raw)
    with raw.open('rb') as file:
        file.seek(at_mb << 20)
        found = file.read(size)
    raw.unlink()
    return found


def _qemu_img(place: Place, *arguments: Any) -> None:
    place.run(shlex.join(map(str, (place.qemu_img, *arguments))))
