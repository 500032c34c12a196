"""KVM with our patches, as modules for Debian's kernel, and their selftest.

Below BUILD/linux, the modules, and the package from which DKMS builds them.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import re
import shutil
import subprocess
from pathlib import Path
from typing import List

from ..kernel import module_name
from . import kernel

TEMPLATES = sorted((Path(__file__).resolve().parent / 'dkms').iterdir())
NAME = 'kvm-memory-fault-denied'
PACKAGE = kernel.FOLDER / NAME
MODULES = [kernel.FOLDER / f'{name}.ko'
           for name in ('kvm', 'kvm-amd', 'kvm-intel')]
SELFTEST = kernel.FOLDER / 'memory_fault_denied_test'


def build() -> None:
    """Build them, if they are missing or older than what they are made of."""
    with kernel.outdated('modules', Path(__file__), *TEMPLATES) as outdated:
        if outdated:
            with kernel.source() as tree:
                _package(tree)
                _build_modules()
                _build_selftest(tree)


def in_place(modules: List[Path]) -> List[Path]:
    """@modules with ours in place of Debian's."""
    ours = {module_name(module): module for module in MODULES}
    return [ours.get(module_name(module), module) for module in modules]


def _package(tree: Path) -> None:
    shutil.rmtree(PACKAGE, ignore_errors=True)
    for folder in ('arch/x86/kvm', 'virt/kvm'):
        shutil.copytree(tree / folder, PACKAGE / folder)
    patches = ''.join(patch.read_text() for patch in kernel.PATCHES)
    for name in re.findall(r'^\+\+\+ b/((?:arch/x86/)?include/.*)', patches,
                           re.M):
        (PACKAGE / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tree / name, PACKAGE / name)
    # The kernel's headers come without virt/.
    makefile = PACKAGE / 'arch/x86/kvm/Makefile'
    text = makefile.read_text().replace('$(srctree)/', '$(src)/../../../')
    makefile.write_text(text)
    for template in TEMPLATES:
        text = template.read_text()
        for word, value in (('NAME', NAME),
                            ('VERSION', kernel.DEBIAN.package.version),
                            ('RELEASE', re.escape(kernel.release()))):
            text = text.replace(f'@{word}@', value)
        (PACKAGE / template.name).write_text(text)


def _build_modules() -> None:
    objects = kernel.FOLDER / 'obj'
    shutil.rmtree(objects, ignore_errors=True)
    shutil.copytree(PACKAGE, objects)
    kernel.make(kernel.headers(), f'M={objects}', 'modules')
    shutil.rmtree(kernel.HEADERS)
    for module in MODULES:
        subprocess.run(['strip', '--strip-debug', '-o', module,
                        objects / 'arch/x86/kvm' / module.name], check=True)
    shutil.rmtree(objects)


def _build_selftest(tree: Path) -> None:
    objects = kernel.FOLDER / 'selftest'
    program = objects / 'x86_64' / SELFTEST.name
    kernel.make(tree, f'O={objects}', 'headers')
    kernel.make(tree / 'tools/testing/selftests/kvm', 'CC=ccache gcc',
                'ARCH=x86', f'KHDR_INCLUDES=-isystem {objects}/usr/include',
                f'OUTPUT={objects}', str(program))
    shutil.copy(program, SELFTEST)
    shutil.rmtree(objects)
