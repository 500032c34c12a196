"""Kernels for the nested lab, built from Debian's source with our patches.

For each of VARIANTS, BUILD/linux holds the kernel as an ELF file, which QEMU
starts without unpacking it; `patched` also leaves a bzImage and the selftest
of the patches there.  Source and objects are removed after the build: the
compiler's cache makes the next one short.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Dict, List

from .. import env, kernel

SOURCE_PACKAGE = 'linux-source-6.12'
PATCHES = env.REPOSITORY / 'patches' / 'linux'
HERE = Path(__file__).resolve().parent
FOLDER = env.BUILD / 'linux'
BZIMAGE = FOLDER / 'bzImage'
SELFTEST = FOLDER / 'memory_fault_denied_test'
# What is configured, on top of `make allnoconfig`.
VARIANTS: Dict[str, List[str]] = {
    'patched': ['kernel.config'],
    'debug': ['kernel.config', 'debug.config'],
}
# The control, without our patches.
DEBIAN = kernel.Kernel(FOLDER / 'control', 'linux-image-6.12-amd64',
                       'linux-image-amd64')


class BuildError(Exception):
    """The kernel cannot be built; says why"""


def vmlinux(variant: str) -> Path:
    return FOLDER / f'vmlinux-{variant}'


def build(*variants: str) -> None:
    """Build what is missing or older than the patches and configurations."""
    for variant in variants or VARIANTS:
        stamp = FOLDER / f'{variant}.stamp'
        digest = _digest(variant)
        if stamp.exists() and stamp.read_text() == digest:
            continue
        stamp.unlink(missing_ok=True)
        tree = _source()
        objects = FOLDER / 'obj'
        shutil.rmtree(objects, ignore_errors=True)
        objects.mkdir()
        _configure(tree, objects, VARIANTS[variant])
        _make(tree, objects, 'vmlinux')
        if variant == 'patched':
            _make(tree, objects, 'bzImage')
            shutil.copy(objects / 'arch/x86/boot/bzImage', BZIMAGE)
            _build_selftest(tree, objects)
        subprocess.run(['strip', '-o', vmlinux(variant), objects / 'vmlinux'],
                       check=True)
        shutil.rmtree(objects)
        stamp.write_text(digest)
    shutil.rmtree(FOLDER / 'src', ignore_errors=True)


def _digest(variant: str) -> str:
    state = hashlib.sha256()
    for path in [*sorted(PATCHES.glob('*.patch')), Path(__file__),
                 *(HERE / name for name in VARIANTS[variant])]:
        state.update(path.read_bytes())
    return state.hexdigest()


def _source() -> Path:
    """The patched source; unpacked once in a build."""
    folder = FOLDER / 'src'
    tree = folder / SOURCE_PACKAGE
    done = folder / 'patched'
    if done.exists():
        return tree
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    deb = kernel.download(SOURCE_PACKAGE, FOLDER / 'download')
    subprocess.run(['dpkg-deb', '-x', deb, folder / 'deb'], check=True)
    subprocess.run(['tar', '-xf',
                    folder / f'deb/usr/src/{SOURCE_PACKAGE}.tar.xz'],
                   cwd=folder, check=True)
    for patch in sorted(PATCHES.glob('*.patch')):
        subprocess.run(['patch', '-s', '-p1', '--batch', '--fuzz=0',
                        '-i', patch], cwd=tree, check=True)
    done.touch()
    return tree


def _configure(tree: Path, objects: Path, names: List[str]) -> None:
    """Configure; an option that the kernel does not take is an error."""
    wanted = ''.join((HERE / name).read_text() for name in names)
    given = objects / 'given.config'
    given.write_text(wanted)
    _make(tree, objects, f'KCONFIG_ALLCONFIG={given}', 'allnoconfig')
    taken = set((objects / '.config').read_text().split('\n'))
    missing = [line for line in re.findall(r'^CONFIG_\w+=.*', wanted, re.M)
               if line not in taken]
    if missing:
        raise BuildError(f'the kernel does not take {", ".join(missing)}')


def _make(tree: Path, objects: Path, *arguments: str) -> None:
    jobs = os.environ.get('JOBS') or str(os.cpu_count())
    log = FOLDER / 'build.log'
    with log.open('wb') as output:
        done = subprocess.run(
            ['make', '-s', '-C', tree, f'O={objects}', f'-j{jobs}',
             'CC=ccache gcc', *arguments], stdin=subprocess.DEVNULL,
            stdout=output, stderr=output, env={
                **os.environ, 'CCACHE_BASEDIR': str(FOLDER),
                'CCACHE_NOHASHDIR': '1',
                # Else each object that names it would be new each time.
                'KBUILD_BUILD_TIMESTAMP': '@0'})
    if done.returncode:
        raise BuildError(f'make {" ".join(arguments)} failed, see {log}')


def _build_selftest(tree: Path, objects: Path) -> None:
    program = objects / 'selftest' / 'x86_64' / SELFTEST.name
    _make(tree, objects, 'headers')
    _make(tree / 'tools/testing/selftests/kvm', objects, 'ARCH=x86',
          f'KHDR_INCLUDES=-isystem {objects}/usr/include',
          f'OUTPUT={objects}/selftest', str(program))
    shutil.copy(program, SELFTEST)
