"""What is tested with KVM, in a nested host.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import re
import time
from functools import partial
from typing import List, Optional

from .. import snapshot
from ..hardware import Hardware
from ..nested.initramfs import KVM_ONLY
from ..scene import Case, Scene
from ..snapshot import TRAPS
from ..steps import (begin_held, expect_active, expect_trap, finish,
                     reboot_guest, refused, wait_until)
from ..vm import BOOT_S, VM
from ..workload import DiskCheck, SelfCheck

SKIPPED = 4  # how a selftest of the kernel says so
QTEST_TIMEOUT = 400
SIGNALS, SIGNAL_EXITS = 20, 'cat /sys/kernel/debug/kvm/signal_exits'
IN_THREAD = ['uffd-signal', 'mprotect']
# How long a VM is paused, and what its clock must not jump by.
PAUSE_S, JUMP_S = 8, 2


def boot(scene: Scene, hardware: Optional[Hardware] = None) -> VM:
    """With a disk, unless @hardware says otherwise, and small workloads."""
    scene.check = SelfCheck(write_mb=24, static_mb=8, pause_us=5000)
    scene.disk_check = DiskCheck(disk_mb=8, ring_mb=1)
    return scene.boot(hardware or scene.hardware(disk=scene.new_disk()))


def selftest(scene: Scene) -> None:
    """The kernel's own test of the patches, all of it."""
    printed = scene.place.run('/bin/memory_fault_denied_test 2>&1', 120)
    if not any(line.endswith(': ok') for line in printed):
        raise AssertionError('it has tested nothing')
    skipped = [line for line in printed if 'skipped' in line]
    if skipped:
        raise AssertionError(skipped[0])


def selftest_skipped(scene: Scene) -> None:
    """A kernel without the patches is noticed."""
    [status] = scene.place.run(
        '/bin/memory_fault_denied_test >/dev/null 2>&1; echo $?')
    if int(status) != SKIPPED:
        raise AssertionError(f'status {status}, expected {SKIPPED}: skipped')


def counted_outside(scene: Scene) -> None:
    """The kernel and our modules agree about the offsets in their structures.

    What ends KVM_RUN for a signal is not part of the modules.
    """
    vm = scene.start(scene.hardware(vcpus=1))
    vm.wait_boot()
    [before] = scene.place.run(SIGNAL_EXITS)
    for _ in range(SIGNALS):
        vm.qmp.cmd('stop')
        vm.qmp.cmd('cont')
    [after] = scene.place.run(SIGNAL_EXITS)
    if int(after) - int(before) < SIGNALS // 2:
        raise AssertionError(f'{after} exits for signals, {before} before '
                             f'{SIGNALS} pauses')


def log_is_read(scene: Scene) -> None:
    """What the host's kernel warns of is noticed, lockdep still looks."""
    scene.place.run('echo WARNING >/sys/kernel/debug/provoke-crash/DIRECT')
    if not scene.place.trouble():
        raise AssertionError('a warning of the kernel was not noticed')
    [state] = scene.place.run('grep debug_locks /proc/lockdep_stats')
    if not re.search(r':\s+1$', state):
        raise AssertionError(f'lockdep has stopped: {state}')


def qtest(test: str, scene: Scene) -> None:
    """The migration tests' boot sector, which fills memory all the time."""
    path = f'/x86_64/migration/background-snapshot/{test}'
    printed = scene.place.run(
        f'cd /tmp; QTEST_QEMU_MACHINE_TYPE=pc QTEST_QEMU_BINARY={KVM_ONLY} '
        f'migration-test --tap -k -p {path} 2>&1 || true', QTEST_TIMEOUT)
    (scene.logs / 'tap.log').write_text('\n'.join(printed))
    if f'ok 1 {path}' not in printed:
        raise AssertionError(next((p for p in printed if 'ok 1' in p),
                                  printed[-1] if printed else 'no output'))


def expect_reasons(vm: VM, word: str) -> None:
    """In-thread traps are out for a reason with @word, however asked for."""
    told = snapshot.traps(vm)
    for trap in IN_THREAD:
        if not re.search(word, told[trap]):
            raise AssertionError(f'{trap}: expected a reason with "{word}", '
                                 f'got "{told[trap]}"')
        snapshot.set_trap(vm, trap)
        refused(trap, word, lambda: snapshot.enable(vm))
    if told['uffd-thread']:
        raise AssertionError(f'uffd-thread is out: {told["uffd-thread"]}')
    snapshot.set_trap(vm, 'auto')


def round_trip(scene: Scene, vm: VM, trap: str,
               expected: str = '') -> None:
    """A snapshot; @expected is what trap is really used."""
    snapshot.set_trap(vm, trap)
    scene.round_trip(vm)
    expect_trap(vm, expected or trap)
    if not snapshot.figures(vm)['trapped-writes']:
        raise AssertionError(f'{trap} has trapped no write')


def each_trap(scene: Scene) -> None:
    """Each can be, and auto takes the first."""
    vm = boot(scene)
    told = snapshot.traps(vm)
    if tuple(told) != TRAPS or any(told.values()):
        raise AssertionError(f'not all are available: {told}')
    round_trip(scene, vm, 'auto', TRAPS[0])
    for trap in TRAPS[1:]:
        round_trip(scene, vm, trap)


def auto(scene: Scene) -> None:
    round_trip(scene, boot(scene), 'auto', 'uffd-signal')


def unpatched(scene: Scene) -> None:
    """Only uffd-thread can be, and auto takes it."""
    vm = boot(scene)
    expect_reasons(vm, 'KVM')
    round_trip(scene, vm, 'auto', 'uffd-thread')


def ruled_out(cpu: str, word: str, scene: Scene) -> None:
    """Something that KVM would write unseen for a guest's CPU."""
    vm = scene.start(scene.hardware(cpu=cpu), '-S')
    expect_reasons(vm, word)


def clock(trap: str, scene: Scene) -> None:
    """The guest's clocks do not jump by the time that the VM was paused.

    KVM tells the guest about it in a page that it writes as a vCPU begins to
    run: if that page is still trapped, the guest goes on with what it was told
    before.
    """
    vm = boot(scene, scene.hardware())
    source = ask(vm, 'cat /sys/devices/system/clocksource/clocksource0/'
                     'current_clocksource')
    if source != 'kvm-clock':
        raise AssertionError(f"the guest's clock is {source}")
    snapshot.set_trap(vm, trap)
    began = time.monotonic()
    before = clocks(vm)
    snapshot.pause(vm)
    time.sleep(PAUSE_S)
    begun = begin_held(scene, vm)
    after = clocks(vm)
    ran = time.monotonic() - began - PAUSE_S
    for old, new in zip(before, after):
        if not 0 <= new - old < ran + JUMP_S:
            raise AssertionError(f'a clock went from {old} to {new} in at '
                                 f'most {ran:.2f} s')
    expect_active(vm, 'guest runs')
    begun.sink.full_speed()
    snapshot.wait(vm, begun.mark)
    scene.prove(vm)


def clocks(vm: VM) -> List[float]:
    """Seconds, as each vCPU tells."""
    return [float(ask(vm, f"taskset {1 << vcpu} cat /proc/uptime").split()[0])
            for vcpu in range(vm.hardware.vcpus)]


def ask(vm: VM, command: str) -> str:
    """The line that a command in the guest prints."""
    mark = vm.console.mark()
    vm.console.run(f'echo answer $({command})')
    return vm.console.wait('^answer (.*)', mark, 60).group(1)


def hotplug(trap: str, scene: Scene) -> None:
    """A vCPU begins to run during a snapshot, and tells KVM its pages."""
    vm = boot(scene)
    snapshot.set_trap(vm, trap)
    online = '/sys/devices/system/cpu/cpu1/online'
    ask(vm, f'echo 0 >{online}; cat {online}')
    begun = begin_held(scene, vm)
    for state in ('1', '0', '1'):
        got = ask(vm, f'echo {state} >{online}; cat {online}')
        if got != state:
            raise AssertionError(f'CPU 1 online is {got}, not {state}')
    expect_active(vm, 'CPU 1 is back')
    finish(scene, vm, begun)


def reboot(trap: str, scene: Scene) -> None:
    """The guest reboots during a snapshot."""
    # Without a disk, whose driver fails requests when Linux reboots.
    vm = boot(scene, scene.hardware())
    snapshot.set_trap(vm, trap)
    begun = begin_held(scene, vm)
    reboot_guest(scene, vm, lambda: vm.console.run('reboot -f'))
    finish(scene, vm, begun)


def lost_memory(scene: Scene) -> None:
    """An access that the host denies, and no trap, ends the guest."""
    file = scene.files / 'ram'
    vm = boot(scene, scene.hardware(ram_file=file))
    scene.place.run(f'truncate -s 32M {file}')
    expect_failed(vm)


def lost_memory_saved(trap: str, scene: Scene) -> None:
    """The same while a snapshot is taken, also where nothing is saved yet."""
    file = scene.files / 'ram'
    vm = boot(scene, scene.hardware(ram_file=file))
    snapshot.set_trap(vm, trap)
    begin_held(scene, vm)
    scene.place.run(f'truncate -s 32M {file}')
    try:
        expect_failed(vm)
    except RuntimeError:
        pass  # SIGBUS: it could not be read in order to be saved


def expect_failed(vm: VM) -> None:
    """Wait until KVM cannot go on; RuntimeError if QEMU ends."""
    wait_until('the guest ends without its memory', lambda:
               'kvm run failed' in vm.output.read_text(errors='replace')
               or vm.assert_alive(), BOOT_S * vm.place.patience)


PATCHED = ['patched']
CASES = [
    Case('selftest', selftest, ['patched', 'shadow', 'debug']),
    Case('selftest-skipped', selftest_skipped, ['control']),
    Case('counted-outside', counted_outside, ['patched', 'control']),
    Case('qtest-auto', partial(qtest, 'kvm/auto'), ['patched', 'control'],
         extra=True),
    Case('qtest-mprotect', partial(qtest, 'kvm/mprotect'), ['debug']),
    *(Case(f'qtest-{trap}', partial(qtest, f'kvm/{trap}'), PATCHED, extra=True)
      for trap in TRAPS),
    Case('qtest-memfd', partial(qtest, 'trap/auto/memfd'), PATCHED,
         extra=True),
    Case('each-trap', each_trap, PATCHED),
    Case('auto', auto, ['debug']),
    Case('unpatched', unpatched, ['control']),
    Case('hyper-v', partial(ruled_out, 'max,svm=off,hv-vpindex=on,hv-time=on',
                            'Hyper-V'), PATCHED),
    Case('svm', partial(ruled_out, 'max,svm=on', 'svm'), PATCHED),
    *(Case(f'clock-{trap}', partial(clock, trap), PATCHED)
      for trap in IN_THREAD),
    Case('hotplug', partial(hotplug, 'uffd-signal'), PATCHED),
    Case('reboot', partial(reboot, 'mprotect'), PATCHED),
    Case('lost-memory', lost_memory, ['patched', 'control']),
    *(Case(f'lost-memory-{trap}', partial(lost_memory_saved, trap), PATCHED)
      for trap in IN_THREAD),
    Case('log-is-read', log_is_read, ['debug']),
]
