"""Debian's own kernels for guests: download, unpack, pick out modules.

Nothing is installed: the packages are unpacked below BUILD.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import lzma
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Iterable, List, NamedTuple

from . import env


class Package(NamedTuple):
    """A package of Debian's, of any version if none is given."""
    name: str
    version: str = ''


class Kernel:
    """What @packages stand for, of which the first that apt knows is taken.

    image: the ELF kernel; root: where the package is unpacked; package: what
    it is, once it is there.
    """

    def __init__(self, folder: Path, *packages: str):
        self.image = folder / 'vmlinux'
        self.root = folder / 'kernel'
        self._folder = folder
        self._packages = packages
        self._package = folder / 'package'

    @property
    def package(self) -> Package:
        return Package(*self._package.read_text().split())

    def fetch(self) -> None:
        """Unpack it, once."""
        if self.image.exists() and self._package.exists():
            return
        shutil.rmtree(self.root, ignore_errors=True)
        package = Package(_image_package(self._packages))
        deb = download(package, self._folder / 'download')
        subprocess.run(['dpkg-deb', '-x', deb, self.root], check=True)
        self._package.write_text(f'{package.name} {field(deb, "Version")}\n')
        shutil.rmtree(deb.parent)
        [image] = (self.root / 'boot').glob('vmlinuz-*')
        part = self.image.with_suffix('.part')
        part.write_bytes(_decompress(image.read_bytes()))
        part.rename(self.image)

    def modules(self, names: List[str]) -> List[Path]:
        """The files of modules and all that they need, in load order.

        Names that are built into the kernel are left out; unknown ones raise.
        """
        [tree] = (self.root / 'lib' / 'modules').iterdir()
        if not (tree / 'modules.dep').exists():
            # /sbin is not in everybody's PATH.
            subprocess.run(['/sbin/depmod', '-b', self.root, tree.name],
                           check=True)
        files: List[str] = []
        for name in names:
            shown = subprocess.run(
                ['/sbin/modprobe', '-C', '/dev/null', '-d', self.root,
                 '-S', tree.name, '--show-depends', name],
                check=True, stdout=subprocess.PIPE, text=True)
            files += re.findall('^insmod (.*?) *$', shown.stdout, re.M)
        return [Path(file) for file in dict.fromkeys(files)]


GUEST = Kernel(env.LAB, 'linux-image-amd64')


def download(package: Package, folder: Path) -> Path:
    """The file of Debian's package, alone in @folder; kept if it is there."""
    wanted = f'{package.name}_{package.version or "*"}_*.deb'
    found = list(folder.glob(wanted))
    if not found:
        part = folder.with_suffix('.part')
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        subprocess.run(['apt-get', '-qq', '-o', 'APT::Sandbox::User=root',
                        'download', '='.join(filter(None, package))],
                       cwd=part, check=True)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        found = list(folder.glob(wanted))
    return found[0]


def field(deb: Path, name: str) -> str:
    """What the file of a package says about itself."""
    return subprocess.run(['dpkg-deb', '-f', deb, name], check=True,
                          stdout=subprocess.PIPE, text=True).stdout.strip()


def _image_package(packages: Iterable[str]) -> str:
    for package in packages:
        shown = subprocess.run(['apt-cache', 'show', '--no-all-versions',
                                package], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)
        found = re.search(r'^Depends:.*?(linux-image-\S+)', shown.stdout,
                          re.M)
        if found:
            return found.group(1)
    raise RuntimeError(f'apt knows none of {", ".join(packages)}: '
                       'run apt-get update as root')


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


def module_bytes(path: Path) -> bytes:
    """The contents of a module, unpacked: busybox insmod needs it so."""
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == '.xz' else data


def module_name(path: Path) -> str:
    return path.name.split('.ko')[0].replace('-', '_')
