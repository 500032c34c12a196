"""What KVM writes into guest memory of its own accord, during a snapshot.

KVM does not tell of such writes if they are denied, they are lost.  kvmwrites.c
has KVM do them to pages that the guest does not write, so that nothing else
lifts a trap that was left there.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import re
from functools import partial
from pathlib import Path
from typing import Dict, NamedTuple

from .. import snapshot
from ..nested.initramfs import KVM_WRITES
from ..scene import Case, Scene
from ..steps import begin_held, expect_active, wait_until
from ..vm import BOOT_S, VM

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

    def prove(self, vm: VM) -> None:
        expect_more(vm, self.before)


def own_writes(trap: str, on_disk: bool, scene: Scene) -> None:
    """They are done, whatever is trapped.

    on_disk: the guest's RAM is, so that there are asynchronous page faults.
    """
    wanted = [name for name in MORE
              if on_disk or name not in ('absent', 'ready')]
    if on_disk:
        scene.place.run('echo 1 >/proc/sys/vm/drop_caches')
    hardware = scene.hardware(vcpus=1, kernel=KVM_WRITES,
                              ram_file=HOST_DISK if on_disk else None)
    vm = scene.start(hardware)
    vm.wait_boot()
    expect_more(vm, {name: 0 for name in wanted})
    snapshot.set_trap(vm, trap)
    snapshot.pause(vm)
    before = {**told(vm), **{name: in_memory(vm, address)
                             for name, address in VERSIONS.items()}}
    begun = begin_held(scene, vm, BUFFER_MB)
    expect_more(vm, {name: before[name] for name in wanted})
    expect_active(vm, 'KVM has written')
    begun.sink.full_speed()
    snapshot.wait(vm, begun.mark)
    now = told(vm)
    expect_more(vm, {name: now[name] for name in ('steal', 'eoi')})
    if on_disk:
        return  # two VMs cannot have it
    vm.qmp.cmd('stop')
    scene.check = GoesOn({name: before[name] for name in wanted})
    scene.prove_image(begun.sink.finish(), hardware)


def told(vm: VM) -> Dict[str, int]:
    """The numbers in the guest's latest line."""
    line = vm.console.wait('^kvm .*', max(0, vm.console.mark() - 1),
                           BOOT_S * vm.place.patience).group(0)
    return {name: int(number)
            for name, number in re.findall(r'(\w+)=(\d+)', line)}


def in_memory(vm: VM, address: int) -> int:
    """A word of the guest's memory."""
    line = vm.qmp.cmd('human-monitor-command',
                      command_line=f'xp /1wd {address:#x}')
    return int(line.split(':')[1])


def expect_more(vm: VM, than: Dict[str, int]) -> None:
    """Wait until the guest has seen more of each."""
    def done() -> bool:
        now = told(vm)
        return all(now[name] >= number + MORE[name]
                   for name, number in than.items())

    wait_until(f'KVM writes more than {than}', done,
               BOOT_S * vm.place.patience)


CASES = [
    Case('own-writes-uffd-signal', partial(own_writes, 'uffd-signal', False),
         ['patched']),
    Case('own-writes-mprotect', partial(own_writes, 'mprotect', True),
         ['patched']),
]
