"""The debugging kernel: all of it built from Debian's source with our patches.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import shutil
import subprocess
from pathlib import Path

from . import kernel

CONFIG = Path(__file__).resolve().parent / 'debug.config'
# An ELF file, which QEMU starts without unpacking it.
VMLINUX = kernel.FOLDER / 'vmlinux-debug'


def build() -> None:
    """Build it, if it is missing or older than what it is made of."""
    with kernel.outdated('debug', Path(__file__), CONFIG) as outdated:
        if outdated:
            with kernel.source() as tree:
                _build(tree)


def _build(tree: Path) -> None:
    objects = kernel.FOLDER / 'obj'
    shutil.rmtree(objects, ignore_errors=True)
    objects.mkdir()
    kernel.make(tree, f'O={objects}', f'KCONFIG_ALLCONFIG={CONFIG}',
                'allnoconfig')
    # An option that the kernel does not take is an error.
    taken = (objects / '.config').read_text().split('\n')
    missing = [line for line in CONFIG.read_text().split('\n')
               if line.startswith('CONFIG_') and line not in taken]
    if missing:
        raise kernel.BuildError(f'no {", ".join(missing)} in this kernel')
    kernel.make(tree, f'O={objects}', 'CC=ccache gcc', 'vmlinux')
    subprocess.run(['strip', '-o', VMLINUX, objects / 'vmlinux'], check=True)
    shutil.rmtree(objects)
