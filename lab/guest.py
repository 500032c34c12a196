"""Builds the guest: programs and an initramfs, below BUILD/lab.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import hashlib
import subprocess
from pathlib import Path
from typing import Dict, List

from . import env, kernel

SOURCES = Path(__file__).resolve().parent / 'guest'
INITRD = env.LAB / 'initrd'
MODULES = ['virtio_pci', 'virtio_blk', 'virtio_balloon', 'virtio_mem',
           'crc32c_generic', 'ext4']
# Program, and the libraries that it is linked with.
PROGRAMS: Dict[str, List[str]] = {
    'selfcheck': [],
    'diskcheck': [],
    'wlat': [],
    # SQLite can load extensions, which a static program cannot: ld warns.
    'database': ['-lsqlite3', '-lm', '-Wl,--no-warnings'],
}


def build() -> None:
    """Build everything that is missing or older than its sources."""
    kernel.fetch()
    stamp = env.LAB / 'initrd.stamp'
    digest = _digest()
    if INITRD.exists() and stamp.exists() and stamp.read_text() == digest:
        return
    for program, libraries in PROGRAMS.items():
        subprocess.run(['gcc', '-std=gnu11', '-O2', '-Wall', '-Wextra',
                        '-Werror', '-static', '-pthread',
                        '-o', env.LAB / program, SOURCES / f'{program}.c',
                        *libraries], check=True)
    part = INITRD.with_suffix('.part')
    part.write_bytes(_initramfs())
    part.rename(INITRD)
    stamp.write_text(digest)


def _digest() -> str:
    state = hashlib.sha256(kernel.KERNEL.name.encode())
    state.update(str(kernel.KERNEL.stat().st_mtime_ns).encode())
    for source in sorted(SOURCES.iterdir()) + [Path(__file__)]:
        state.update(source.read_bytes())
    return state.hexdigest()


def _initramfs() -> bytes:
    archive = b''.join(_entry(d, 0o040755) for d in
                       ('bin', 'dev', 'proc', 'sys', 'run', 'modules'))
    archive += _entry('init', 0o100755, (SOURCES / 'init').read_bytes())
    archive += _entry('bin/busybox', 0o100755,
                      Path('/bin/busybox').read_bytes())
    for program in PROGRAMS:
        archive += _entry(f'bin/{program}', 0o100755,
                          (env.LAB / program).read_bytes())
    order = ''
    for path in kernel.modules(MODULES):
        name = path.name.removesuffix('.xz')
        archive += _entry(f'modules/{name}', 0o100644,
                          kernel.module_bytes(path))
        order += name + '\n'
    archive += _entry('modules/order', 0o100644, order.encode())
    # The kernel opens it for init before devtmpfs is there.
    archive += _entry('dev/console', 0o020600, rdev=(5, 1))
    return archive + _entry('TRAILER!!!', 0)


def _entry(name: str, mode: int, data: bytes = b'', rdev=(0, 0)) -> bytes:
    """One member of a cpio archive in the "newc" format."""
    _entry.inode += 1
    fields = (_entry.inode, mode, 0, 0, 1, 0, len(data), 0, 0, *rdev,
              len(name) + 1, 0)
    head = b'070701' + b''.join(b'%08X' % f for f in fields)
    head += name.encode() + b'\0'
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


_entry.inode = 0
