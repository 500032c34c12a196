"""Builds the guest: programs and an initramfs, below BUILD/lab.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import hashlib
import subprocess
from pathlib import Path
from typing import Dict, List

from . import archive, env, kernel

SOURCES = Path(__file__).resolve().parent / 'guest'
INITRD = env.LAB / 'initrd'
MODULES = ['virtio_pci', 'virtio_blk', 'virtio_balloon', 'virtio_mem',
           'crc32c_generic', 'ext4']
# Program, and the libraries that it is linked with.
PROGRAMS: Dict[str, List[str]] = {
    'selfcheck': [],
    'diskcheck': [],
    'wlat': [],
    'keyvalue': [],
    # SQLite can load extensions, which a static program cannot: ld warns.
    'database': ['-lsqlite3', '-lm', '-Wl,--no-warnings'],
}


def build() -> None:
    """Build everything that is missing or older than its sources."""
    kernel.GUEST.fetch()
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
    part.write_bytes(initramfs(list(PROGRAMS),
                               kernel.GUEST.modules(MODULES)))
    part.rename(INITRD)
    stamp.write_text(digest)


def initramfs(programs: List[str], modules: List[Path]) -> bytes:
    """With these programs and, in the order of loading, kernel modules."""
    files = archive.Archive()
    for name in ('/proc', '/sys', '/run'):
        files.directory(name)
    files.file('/init', (SOURCES / 'init').read_bytes(), archive.PROGRAM)
    files.copy(Path('/bin/busybox'), '/bin/busybox')
    for program in programs:
        files.copy(env.LAB / program, f'/bin/{program}')
    add_modules(files, modules)
    return files.bytes()


def add_modules(files: archive.Archive, modules: List[Path]) -> None:
    """What init loads."""
    names = []
    for path in modules:
        names.append(path.name.removesuffix('.xz'))
        files.file(f'/modules/{names[-1]}', kernel.module_bytes(path))
    files.file('/modules/order', ''.join(f'{n}\n' for n in names).encode())


def _digest() -> str:
    state = hashlib.sha256(kernel.GUEST.image.name.encode())
    state.update(str(kernel.GUEST.image.stat().st_mtime_ns).encode())
    for source in sorted(SOURCES.iterdir()) + [Path(__file__),
                                               Path(archive.__file__)]:
        state.update(source.read_bytes())
    return state.hexdigest()
