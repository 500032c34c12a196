"""Debian's own kernel for the guest: download, unpack, pick out modules.

Nothing is installed: the package is unpacked below BUILD/lab.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import lzma
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import List

from . import env

META_PACKAGE = 'linux-image-amd64'
KERNEL = env.LAB / 'vmlinux'
ROOT = env.LAB / 'kernel'


def fetch() -> None:
    """Unpack the kernel that META_PACKAGE stands for, once."""
    if KERNEL.exists():
        return
    package = _image_package()
    download = env.LAB / 'download'
    shutil.rmtree(download, ignore_errors=True)
    shutil.rmtree(ROOT, ignore_errors=True)
    download.mkdir(parents=True)
    subprocess.run(['apt-get', '-qq', '-o', 'APT::Sandbox::User=root',
                    'download', package], cwd=download, check=True)
    [deb] = download.glob('*.deb')
    subprocess.run(['dpkg-deb', '-x', deb, ROOT], check=True)
    shutil.rmtree(download)
    [image] = (ROOT / 'boot').glob('vmlinuz-*')
    part = KERNEL.with_suffix('.part')
    part.write_bytes(_decompress(image.read_bytes()))
    part.rename(KERNEL)


def _image_package() -> str:
    shown = subprocess.run(['apt-cache', 'show', '--no-all-versions',
                            META_PACKAGE], stdout=subprocess.PIPE, text=True)
    found = re.search(r'^Depends:.*?(linux-image-\S+)', shown.stdout, re.M)
    if not found:
        raise RuntimeError(f'apt knows no {META_PACKAGE}: '
                           'run apt-get update as root')
    return found.group(1)


def _decompress(bzimage: bytes) -> bytes:
    """The ELF kernel inside a bzImage.

    QEMU starts it through PVH, which saves the guest from unpacking it under
    TCG: 1.7 seconds to a shell where the bzImage takes 5.
    """
    setup_sectors = (bzimage[0x1f1] or 4) + 1
    offset, length = struct.unpack_from('<II', bzimage, 0x248)
    start = setup_sectors * 512 + offset
    payload = bzimage[start:start + length]
    if payload.startswith(b'\xfd7zXZ'):
        return lzma.LZMADecompressor().decompress(payload)
    if payload.startswith(b'\x28\xb5\x2f\xfd'):
        # The size that follows the frame is not part of it; zstd complains
        # about it after having written everything.
        return subprocess.run(['zstd', '-dcq'], input=payload[:-4],
                              stdout=subprocess.PIPE, check=True).stdout
    raise RuntimeError('kernel image compressed in an unknown way: '
                       f'{payload[:6]!r}')


def modules(names: List[str]) -> List[Path]:
    """The files of the named modules and all that they need, in load order.

    Names that are built into the kernel are left out; unknown ones raise.
    """
    [tree] = (ROOT / 'lib' / 'modules').iterdir()
    files = {_name(f): f for f in tree.rglob('*.ko*')}
    builtin = {_name(Path(line)) for line
               in (tree / 'modules.builtin').read_text().split()}
    ordered: List[Path] = []

    def add(name: str) -> None:
        if name in builtin or files.get(name) in ordered:
            return
        if name not in files:
            raise RuntimeError(f'{tree.name} has no module {name}')
        found = re.search(rb'\0depends=([^\0]*)\0', module_bytes(files[name]))
        for needed in found.group(1).decode().split(',') if found else ():
            if needed:
                add(_name(Path(needed)))
        ordered.append(files[name])

    for name in names:
        add(name)
    return ordered


def module_bytes(path: Path) -> bytes:
    """The contents of a module, unpacked: busybox insmod needs it so."""
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == '.xz' else data


def _name(path: Path) -> str:
    return path.name.split('.ko')[0].replace('-', '_')
