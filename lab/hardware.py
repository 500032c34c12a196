"""What a virtual machine has, and how QEMU is told so.

SPDX-License-Identifier: GPL-2.0-or-later
"""
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional, Tuple

from . import guest
from .kernel import GUEST
from .memory import KINDS

MACHINE = 'pc-q35-10.0'
# Without init_on_alloc, what the balloon takes is not written before.
CMDLINE = ('console=ttyS0 quiet loglevel=4 panic=-1 tsc=reliable '
           'no_timer_check mitigations=off cryptomgr.notests init_on_alloc=0 '
           'rcupdate.rcu_cpu_stall_timeout=120 memhp_default_state=online')


@dataclass
class Hardware:
    """What a VM has; a restored one must have the same.

    memory: one of memory.KINDS; or ram_file: the file that is to be its RAM.
    disk: a qcow2 image, which becomes the guest's /dev/vda; read and written
        by @aio, in a thread of its own if @iothread.
    devices: a -device each.
    accel, cpu, kernel, initrd, cmdline: as QEMU's options.
    """
    vcpus: int = 1
    ram_mb: int = 320
    memory: str = 'plain'
    ram_file: Optional[Path] = None
    disk: Optional[Path] = None
    aio: str = 'threads'
    iothread: bool = False
    devices: Tuple[str, ...] = ()
    accel: str = 'tcg,thread=multi'
    cpu: str = 'max'
    kernel: Path = GUEST.image
    initrd: Path = guest.INITRD
    cmdline: str = CMDLINE

    def arguments(self) -> List[str]:
        machine, more = KINDS[self.memory].arguments(self.ram_mb)
        if self.ram_file:
            machine = ',memory-backend=file'
            more += ['-object', 'memory-backend-file,id=file,share=on,'
                     f'size={self.ram_mb}M,mem-path={self.ram_file}']
        if self.disk:
            more += ['-blockdev', 'driver=qcow2,node-name=disk,'
                     'file.driver=file,cache.direct=on,'
                     f'file.cache.direct=on,file.aio={self.aio},'
                     f'file.filename={self.disk}']
            device = 'virtio-blk-pci,id=vda,drive=disk'
            if self.iothread:
                more += ['-object', 'iothread,id=disk-thread']
                device += ',iothread=disk-thread'
            more += ['-device', device]
        for device in self.devices:
            more += ['-device', device]
        return ['-nodefaults', '-no-user-config', '-display', 'none',
                '-M', f'{MACHINE},usb=off{machine}',
                '-accel', self.accel, '-cpu', self.cpu,
                '-smp', str(self.vcpus), '-kernel', str(self.kernel),
                '-initrd', str(self.initrd), '-append', self.cmdline, *more]
