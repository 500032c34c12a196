"""Where everything is: read once from the environment.

BUILD  the build directory                  (default: build/ of the repository)
QEMU   the patched qemu-system-x86_64       (default: in BUILD)
STOCK  the unmodified one, which restores   (default: in BUILD/stock)
LIBVIRT, LIBVIRT_STOCK  where libvirt was built, with its series and without
                        (default: libvirt/obj, libvirt/stock/obj in BUILD)
QEMU_PYTHON  the python/ folder of a QEMU tree (default: BUILD/src/python)

SPDX-License-Identifier: GPL-2.0-or-later
"""
import os
import sys
from pathlib import Path
from typing import Tuple

REPOSITORY = Path(__file__).resolve().parent.parent
BUILD = Path(os.environ.get('BUILD') or REPOSITORY / 'build').resolve()
QEMU = Path(os.environ.get('QEMU') or BUILD / 'qemu-system-x86_64').resolve()
STOCK = Path(os.environ.get('STOCK')
             or BUILD / 'stock' / 'qemu-system-x86_64').resolve()
LIBVIRT = Path(os.environ.get('LIBVIRT')
               or BUILD / 'libvirt' / 'obj').resolve()
LIBVIRT_STOCK = Path(os.environ.get('LIBVIRT_STOCK') or
                     BUILD / 'libvirt' / 'stock' / 'obj').resolve()
QEMU_PYTHON = Path(os.environ.get('QEMU_PYTHON') or BUILD / 'src' / 'python')
LAB = BUILD / 'lab'
LOGS = BUILD / 'logs'


def require() -> None:
    """Exit with an explanation unless both binaries and qemu.qmp are there."""
    _require(('the patched QEMU', QEMU, 'run make, or set QEMU'),
             ('the unmodified QEMU', STOCK, 'run make stock, or set STOCK'),
             ('qemu.qmp', QEMU_PYTHON / 'qemu' / 'qmp',
              'run make prepare, or set QEMU_PYTHON'))


def require_libvirt(stock: bool = True) -> None:
    """Exit with an explanation unless it is there with its series.

    stock: and without.
    """
    builds = {'patched': LIBVIRT, **({'unmodified': LIBVIRT_STOCK} if stock
                                     else {})}
    _require(*((f'the {what} libvirt', build / 'src' / 'virtqemud',
                'run make check-libvirt') for what, build in builds.items()))


def _require(*needs: Tuple[str, Path, str]) -> None:
    for what, path, how in needs:
        if not path.exists():
            sys.exit(f'{what} is not at {path}: {how}')


def qemu_img(binary: Path) -> Path:
    """The qemu-img that was built together with a qemu-system binary."""
    return binary.with_name('qemu-img')


sys.path.insert(0, str(QEMU_PYTHON))
