"""The kinds of memory that a VM can have.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from . import env, host

TMPFS = Path('/dev/shm')
HUGE_TMPFS = env.LAB / 'tmpfs'
# An even number of these, 128 MiB, is the least that Linux plugs in.
BOOT_MB = 192


@dataclass(frozen=True)
class Kind:
    """How to give a VM its memory.

    backends: of the RAM that the VM starts with, each a NUMA node if there
        are several; none: QEMU's default.
    plug: options of a device that most of the RAM is on, in place of all but
        BOOT_MB; {mb} stands for its size.
    plug_backend: of that device; twice as large if it is @half_plugged.
    folder: where files are made; on a tmpfs or not, or mounted for it.
    huge: backends are made of huge pages.
    thp: the host's transparent_hugepage/enabled while such a VM is used.
    uses: a line of /proc/PID/smaps_rollup, and whether it must be large or
        about 0.
    shared: userfaultfd needs Linux 5.19 for it.
    regular_file: userfaultfd cannot serve it at all.
    """
    backends: Tuple[str, ...] = ()
    plug: str = ''
    plug_backend: str = ''
    half_plugged: bool = False
    folder: Path = env.LAB
    huge: bool = False
    thp: str = ''
    uses: Optional[Tuple[str, bool]] = None
    shared: bool = False
    regular_file: bool = False

    def prepare(self, stack: contextlib.ExitStack, ram_mb: int) -> None:
        """Have the host ready for two such VMs, until @stack is left.

        Raises Skip if that cannot be.
        """
        if self.thp:
            host.change(stack, host.THP_ENABLED, self.thp)
        if self.huge:
            host.reserve_huge_pages(stack, 2 * ram_mb)
        if self.folder == HUGE_TMPFS:
            host.mount_tmpfs(stack, self.folder, 'huge=always')
        elif any('mem-path' in backend for backend in self.backends):
            host.needs_file_system(self.folder, memory=self.folder == TMPFS)
            host.needs_room(self.folder, 2 * ram_mb)

    def has(self, trap: str) -> bool:
        """Whether this host has the write trap for this kind of memory."""
        if trap == 'mprotect':
            return True
        needed = host.UFFD_WRITE_PROTECT
        if trap == 'uffd-signal':
            needed |= host.UFFD_SIGBUS
        if self.shared:
            needed |= host.UFFD_WRITE_PROTECT_SHARED
        there = host.userfaultfd_features(trap == 'uffd-signal')
        return not self.regular_file and there & needed == needed

    def arguments(self, ram_mb: int) -> Tuple[str, List[str]]:
        """Options of -M, which begin with a comma, and more arguments."""
        machine = ''
        boot_mb = BOOT_MB if self.plug else ram_mb
        more: List[str] = ['-m', f'{boot_mb}M']
        part = boot_mb // max(len(self.backends), 1)
        for node, backend in enumerate(self.backends):
            more += ['-object', f'{backend},id=ram{node},size={part}M']
            if len(self.backends) > 1:
                more += ['-numa', f'node,nodeid={node},memdev=ram{node}']
        if len(self.backends) == 1:
            machine = ',memory-backend=ram0'
        if self.plug:
            plug_mb = ram_mb - boot_mb
            size = plug_mb * 2 if self.half_plugged else plug_mb
            more[1] += ',slots=2,maxmem=8G'
            more += ['-object', f'{self.plug_backend},id=plug,size={size}M',
                     '-device',
                     f'{self.plug},memdev=plug'.format(mb=plug_mb)]
        return machine, more


def _file(folder: Path, share: str) -> str:
    # With a folder, each QEMU makes a file of its own there.
    return f'memory-backend-file,mem-path={folder},share={share}'


VIRTIO_MEM = 'virtio-mem-pci,id=vmem,requested-size={mb}M'
KINDS: Dict[str, Kind] = {
    'plain': Kind(),
    'ram-shared': Kind(('memory-backend-ram,share=on',), shared=True),
    'memfd': Kind(('memory-backend-memfd,share=on',), shared=True),
    'file-shared': Kind((_file(env.LAB, 'on'),), regular_file=True),
    'file-private': Kind((_file(env.LAB, 'off'),), regular_file=True),
    'tmpfs-shared': Kind((_file(TMPFS, 'on'),), folder=TMPFS, shared=True),
    'tmpfs-private': Kind((_file(TMPFS, 'off'),), folder=TMPFS, shared=True),
    'hugetlb': Kind(('memory-backend-memfd,share=on,hugetlb=on,'
                     'hugetlbsize=2M',), huge=True, shared=True),
    'thp': Kind(thp='always', uses=('AnonHugePages', True)),
    'no-thp': Kind(thp='never', uses=('AnonHugePages', False)),
    # memfds are not aligned to huge pages.
    'tmpfs-thp': Kind((_file(HUGE_TMPFS, 'on') + ',align=2M',),
                      folder=HUGE_TMPFS, uses=('ShmemPmdMapped', True),
                      shared=True),
    'numa': Kind(('memory-backend-ram', 'memory-backend-memfd,share=on'),
                 shared=True),
    'dimm': Kind(plug='pc-dimm,id=dimm', plug_backend='memory-backend-ram'),
    'virtio-mem': Kind(plug=VIRTIO_MEM, plug_backend='memory-backend-ram',
                       half_plugged=True),
    'virtio-mem-memfd': Kind(
        plug=VIRTIO_MEM, plug_backend='memory-backend-memfd,share=on',
        half_plugged=True, shared=True),
}
