"""Which write traps there are, which one is taken, on which host.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import re
from pathlib import Path
from typing import Sequence

from .. import host, snapshot
from ..scene import Case, Scene
from ..sink import PipeSink
from ..steps import begin, expect_trap, finish, refused, still_clean
from ..vm import VM
from ..workload import SelfCheck

WITHOUT_USERFAULTFD = [str(Path(__file__).resolve().parent.parent
                           / 'without-userfaultfd')]
# Reading anything is left to it: the build may be where nobody else can read.
AS_NOBODY = ['setpriv', '--reuid=65534', '--regid=65534', '--clear-groups',
             '--inh-caps=-all,+dac_read_search',
             '--ambient-caps=-all,+dac_read_search',
             '--bounding-set=-all,+dac_read_search', '--pdeathsig=KILL']
KSM = Path('/sys/kernel/mm/ksm/run')
UNPRIVILEGED = Path('/proc/sys/vm/unprivileged_userfaultfd')
HELP = r'/dev/userfaultfd.*vm\.unprivileged_userfaultfd'


def boot(scene: Scene, launcher: Sequence[str] = ()) -> VM:
    scene.check = SelfCheck(write_mb=48, static_mb=16)
    return scene.boot(launcher=launcher)


def expect_out(vm: VM, *out: str, hint: str = HELP) -> None:
    """Exactly the traps @out cannot be, and it is told what would help."""
    for trap, reason in snapshot.traps(vm).items():
        if (trap in out) != bool(reason):
            raise AssertionError(f'{trap}: expected '
                                 + ('a reason' if trap in out else 'none')
                                 + f', got "{reason}"')
        if reason and not re.search(hint, reason):
            raise AssertionError(f'{trap}: what would help? {reason}')


def auto_takes(scene: Scene, vm: VM, trap: str) -> None:
    """As a pipe, the image can be written by whatever user QEMU runs as."""
    scene.round_trip(vm, PipeSink(scene.image()))
    expect_trap(vm, trap)


def unprivileged(scene: Scene) -> None:
    """Without /dev/userfaultfd, only writes by user code can be trapped."""
    host.needs_root('running QEMU as nobody')
    host.change(scene, UNPRIVILEGED, '0')
    vm = boot(scene, AS_NOBODY)
    expect_out(vm, 'uffd-thread')
    auto_takes(scene, vm, 'uffd-signal')


def userfaultfd_forbidden(scene: Scene) -> None:
    host.needs_root('running QEMU as nobody')
    host.change(scene, UNPRIVILEGED, '0')
    vm = boot(scene, WITHOUT_USERFAULTFD + AS_NOBODY)
    expect_out(vm, 'uffd-signal', 'uffd-thread')
    for trap in ('uffd-signal', 'uffd-thread'):
        snapshot.set_trap(vm, trap)
        refused(trap, f'{trap}: .*{HELP}', lambda: snapshot.enable(vm))
        still_clean(scene, vm)
    snapshot.set_trap(vm, 'auto')
    auto_takes(scene, vm, 'mprotect')


def during(scene: Scene) -> None:
    """Another trap, asked for during a snapshot, is that of the next.

    What would change the present one is refused.
    """
    vm = boot(scene)
    snapshot.set_trap(vm, 'mprotect')
    begun = begin(scene, vm)
    refused('a query', 'migration', lambda: snapshot.traps(vm))
    refused('a capability', 'migration|progress', lambda: snapshot.enable(vm))
    snapshot.set_trap(vm, 'auto')
    still_clean(scene, vm)
    finish(scene, vm, begun)
    vm.qmp.cmd('cont')
    expect_trap(vm, 'mprotect')
    scene.choose_trap(vm, 'uffd-signal')
    snapshot.set_trap(vm, 'auto')
    auto_takes(scene, vm, 'uffd-signal')


def merging(scene: Scene) -> None:
    """KSM would lift userfaultfd's protection, if the VM lets it merge."""
    host.needs_root('starting KSM')
    host.change(scene, KSM, '1')
    vm = boot(scene)
    expect_out(vm, 'uffd-signal', 'uffd-thread', hint='KSM.*mem-merge=off')
    auto_takes(scene, vm, 'mprotect')
    host.change(scene, KSM, '0')
    expect_out(vm)
    auto_takes(scene, vm, 'uffd-signal')


CASES = [
    Case('trap-unprivileged', unprivileged),
    Case('trap-userfaultfd-forbidden', userfaultfd_forbidden),
    Case('trap-merging', merging),
    Case('trap-during', during),
]
