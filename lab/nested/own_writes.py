"""What KVM writes into guest memory of its own accord, during a snapshot.

KVM does not tell of such writes if they are denied, they are lost.  kvmwrites.c
has KVM do them to pages that the guest does not write, so that nothing else
lifts a trap that was left there.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import re
import time
from pathlib import Path
from typing import Callable, Dict, NamedTuple

from .. import snapshot
from ..cases.lifecycle import expect_active
from .initramfs import KVM_WRITES
from .scene import BOOT_TIMEOUT, SNAPSHOT_TIMEOUT, NestedScene, begin
from .vm import NestedHardware, NestedVM

# Too small for the scanner to reach the pages in question, at 40 MiB.
BUFFER_MB = 16
# As in kvmwrites.c, in bytes.
VERSIONS = {'clock': 40 << 20, 'steal': (40 << 20) + (1 << 17) + 8}
# More than can have happened between the guest's last line and the pause.
MORE = {'clock': 1, 'steal': 1, 'eoi': 100, 'absent': 5, 'ready': 5,
        'smm': 5}
# Memory that has to be read from it is not there at once.
HOST_DISK = Path('/dev/vda')


class GoesOn(NamedTuple):
    """What proves such a guest: it has seen more of each than @before."""
    before: Dict[str, int]

    def prove(self, vm: NestedVM) -> None:
        expect_more(vm, self.before)


def own_writes(trap: str, on_disk: bool) -> Callable[[NestedScene], None]:
    """They are done, whatever is trapped.

    on_disk: the guest's RAM is, so that there are asynchronous page faults.
    """
    wanted = [name for name in MORE
              if on_disk or name not in ('absent', 'ready')]

    def run(scene: NestedScene) -> None:
        if on_disk:
            scene.host.run('echo 1 >/proc/sys/vm/drop_caches')
        hardware = NestedHardware(vcpus=1, guest=KVM_WRITES,
                                  ram_file=HOST_DISK if on_disk else None)
        vm = scene.start(hardware)
        vm.wait_boot(BOOT_TIMEOUT)
        expect_more(vm, {name: 0 for name in wanted})
        snapshot.set_trap(vm, trap)
        snapshot.pause(vm)
        before = {**told(vm), **{name: in_memory(vm, address)
                                 for name, address in VERSIONS.items()}}
        sink, mark, _ = begin(scene, vm, BUFFER_MB)
        expect_more(vm, {name: before[name] for name in wanted})
        expect_active(vm, 'KVM has written')
        sink.open()
        snapshot.wait(vm, mark, SNAPSHOT_TIMEOUT)
        now = told(vm)
        expect_more(vm, {name: now[name] for name in ('steal', 'eoi')})
        if on_disk:
            return  # two VMs cannot have it
        vm.qmp.cmd('stop')
        scene.check = GoesOn({name: before[name] for name in wanted})
        scene.prove_image(sink.finish(), hardware)

    return run


def told(vm: NestedVM) -> Dict[str, int]:
    """The numbers in the guest's latest line."""
    line = vm.console.wait('^kvm .*', max(0, vm.console.mark() - 1),
                           BOOT_TIMEOUT).group(0)
    return {name: int(number)
            for name, number in re.findall(r'(\w+)=(\d+)', line)}


def in_memory(vm: NestedVM, address: int) -> int:
    """A word of the guest's memory."""
    line = vm.qmp.cmd('human-monitor-command',
                      command_line=f'xp /1wd {address:#x}')
    return int(line.split(':')[1])


def expect_more(vm: NestedVM, than: Dict[str, int]) -> None:
    """Wait until the guest has seen more of each."""
    deadline = time.monotonic() + BOOT_TIMEOUT
    while True:
        now = told(vm)
        less = [f'{name}={now[name]} after {number}'
                for name, number in than.items()
                if now[name] < number + MORE[name]]
        if not less:
            return
        if time.monotonic() > deadline:
            raise AssertionError(f'KVM does not write: {", ".join(less)}')
        time.sleep(0.1)
