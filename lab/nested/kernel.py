"""Debian's Linux for the nested lab, and what is built from its source.

All of BUILD/linux is of one version, that of the control.  Nothing is installed.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import hashlib
import os
import re
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from .. import env, kernel

SOURCE = 'linux-source-6.12'
PATCHES = sorted((env.REPOSITORY / 'patches' / 'linux').glob('*.patch'))
FOLDER = env.BUILD / 'linux'
DOWNLOADS = FOLDER / 'download'
HEADERS = FOLDER / 'headers'
# The control, without our patches.
DEBIAN = kernel.Kernel(FOLDER / 'control', 'linux-image-6.12-amd64',
                       'linux-image-amd64')


class BuildError(Exception):
    """Something cannot be built; says why"""


@contextmanager
def outdated(name: str, *files: Path) -> Iterator[bool]:
    """Is @name to be built: older than the kernel, the patches and @files?

    It is up to date once the block is left.
    """
    DEBIAN.fetch()
    state = hashlib.sha256(' '.join(DEBIAN.package).encode())
    for path in [*PATCHES, Path(__file__), *files]:
        state.update(path.read_bytes())
    stamp = FOLDER / f'{name}.stamp'
    if stamp.exists() and stamp.read_text() == state.hexdigest():
        yield False
        return
    stamp.unlink(missing_ok=True)
    yield True
    stamp.write_text(state.hexdigest())


@contextmanager
def source() -> Iterator[Path]:
    """The kernel's source with our patches, for as long as it is needed."""
    folder = FOLDER / 'src'
    shutil.rmtree(folder, ignore_errors=True)
    _unpack(SOURCE, folder / 'deb')
    subprocess.run(['tar', '-xf', f'deb/usr/src/{SOURCE}.tar.xz'],
                   cwd=folder, check=True)
    for patch in PATCHES:
        subprocess.run(['patch', '-s', '-p1', '--batch', '--fuzz=0',
                        '-i', patch], cwd=folder / SOURCE, check=True)
    yield folder / SOURCE
    shutil.rmtree(folder)


def headers() -> Path:
    """A directory in HEADERS: `make -C` of it builds modules for the kernel."""
    shutil.rmtree(HEADERS, ignore_errors=True)
    package = DEBIAN.package.name.replace('-image-', '-headers-', 1)
    deb = _unpack(package, HEADERS)
    for needed in re.findall(r'linux-(?:headers|kbuild)-[^ ,]+',
                             kernel.field(deb, 'Depends')):
        _unpack(needed, HEADERS)
    tree = HEADERS / 'usr/src' / package
    makefile = tree / 'Makefile'
    makefile.write_text(makefile.read_text().replace('/usr/src',
                                                     f'{HEADERS}/usr/src'))
    # Only for type information, which takes another program.
    (tree / 'vmlinux').unlink(missing_ok=True)
    return tree


def release() -> str:
    """As `uname -r` says, without the flavour: 6.12.9+deb12."""
    return DEBIAN.package.name.split('-')[2]


def make(folder: Path, *arguments: str) -> None:
    jobs = os.environ.get('JOBS') or str(os.cpu_count())
    log = FOLDER / 'build.log'
    with log.open('wb') as output:
        done = subprocess.run(
            ['make', '-s', '-C', folder, f'-j{jobs}', *arguments],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={
                **os.environ, 'CCACHE_BASEDIR': str(FOLDER),
                'CCACHE_NOHASHDIR': '1',
                # For Debian's headers.
                'DEBIAN_KERNEL_USE_CCACHE': '1',
                # Else each object that names it would be new each time.
                'KBUILD_BUILD_TIMESTAMP': '@0'})
    if done.returncode:
        raise BuildError(f'make {" ".join(arguments)} failed, see {log}')


def _unpack(name: str, folder: Path) -> Path:
    """A package of the kernel's version; returns its file."""
    package = kernel.Package(name, DEBIAN.package.version)
    try:
        deb = kernel.download(package, DOWNLOADS / name)
    except subprocess.CalledProcessError as problem:
        raise BuildError(
            f'apt has no {name} {package.version}. The kernel in {FOLDER} has '
            'to be a 6.12 of which apt has all packages: without it, the '
            'latest is taken') from problem
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(['dpkg-deb', '-x', deb, folder], check=True)
    return deb
