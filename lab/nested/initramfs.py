"""What the nested lab's host has in its initramfs.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import subprocess
from pathlib import Path
from typing import List

from .. import env, guest
from ..archive import PROGRAM, Archive
from . import modules
from .kernel import DEBIAN, FOLDER

HERE = Path(__file__).resolve().parent
# For Debian's kernel with our KVM, the same with its own, the debugging kernel.
PATCHED = FOLDER / 'initrd-patched'
CONTROL = FOLDER / 'initrd-control'
DEBUG = FOLDER / 'initrd-debug'
MODULES = ['kvm_amd', 'virtio_pci', 'virtio_console', 'virtio_blk']
# Programs in the host.
OURS = Path('/bin/qemu-system-x86_64')
STOCK = Path('/bin/stock-qemu-system-x86_64')
QEMU_IMG = Path('/bin/qemu-img')
KVM_ONLY = Path('/kvm-only/qemu-system-x86_64')
# The nested guest: Debian's kernel as well.
KERNEL = Path('/guest/vmlinux')
INITRD = Path('/guest/initrd')
PROGRAMS = ['selfcheck', 'diskcheck']
# A nested guest by itself
KVM_WRITES = Path('/guest/kvmwrites')
FIRMWARE = {
    '/usr/share/qemu': ['kvmvapic.bin', 'linuxboot_dma.bin', 'pvh.bin'],
    '/usr/share/seabios': ['bios-256k.bin', 'vgabios-stdvga.bin'],
    '/usr/lib/ipxe/qemu': ['efi-e1000.rom'],
}


def build() -> None:
    """Write them; builds and fetches what is in them."""
    modules.build()
    guest.build()
    bare = build_bare(HERE / 'kvmwrites.c')
    debian = DEBIAN.modules(MODULES)
    _write(PATCHED, bare, modules.in_place(debian))
    _write(CONTROL, bare, debian)
    _write(DEBUG, bare, [])


def build_bare(source: Path) -> Path:
    """A program that runs without a system: see bare.h."""
    program = FOLDER / source.stem
    subprocess.run(
        ['gcc', '-m32', '-std=gnu11', '-O2', '-Wall', '-Wextra', '-Werror',
         '-ffreestanding', '-mgeneral-regs-only', '-fcf-protection=none',
         '-fno-asynchronous-unwind-tables', '-fno-pie', '-no-pie', '-static',
         '-nostdlib', '-Wl,--build-id=none,-Ttext-segment=0x100000,-e,start',
         '-I', HERE, '-o', program, source], check=True)
    return program


def _write(path: Path, bare: Path, loaded: List[Path]) -> None:
    files = Archive()
    for name in ('/proc', '/sys'):
        files.directory(name)
    files.file('/init', (HERE / 'init').read_bytes(), PROGRAM)
    files.file(str(KVM_ONLY), (HERE / 'kvm-only').read_bytes(), PROGRAM)
    files.copy(Path('/bin/busybox'), '/bin/busybox')
    for program, name in (
            (env.QEMU, OURS), (env.STOCK, STOCK),
            (env.qemu_img(env.STOCK), QEMU_IMG),
            (env.QEMU.parent / 'tests/qtest/migration-test',
             '/bin/migration-test'),
            (modules.SELFTEST, f'/bin/{modules.SELFTEST.name}')):
        files.program(program, str(name))
    files.copy(DEBIAN.image, str(KERNEL))
    files.copy(bare, str(KVM_WRITES))
    files.file(str(INITRD), guest.initramfs(
        PROGRAMS, DEBIAN.modules(['virtio_pci', 'virtio_blk'])))
    for folder, names in FIRMWARE.items():
        for name in names:
            files.copy(Path(folder) / name)
    guest.add_modules(files, loaded)
    path.write_bytes(files.bytes())
