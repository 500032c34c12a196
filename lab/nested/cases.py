"""What is tested with KVM in the nested lab's host.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import re
import time
from typing import Callable, List, NamedTuple

from .. import snapshot
from ..cases.bad_input import refused
from ..cases.lifecycle import expect_active
from .initramfs import KVM_ONLY
from .own_writes import own_writes
from .scene import BOOT_TIMEOUT, SNAPSHOT_TIMEOUT, NestedScene, begin
from .vm import NestedHardware, NestedVM

SKIPPED = 4  # how a selftest of the kernel says so
QTEST_TIMEOUT = 400
SIGNALS, SIGNAL_EXITS = 20, 'cat /sys/kernel/debug/kvm/signal_exits'
IN_THREAD = ['uffd-signal', 'mprotect']
TRAPS = [*IN_THREAD, 'uffd-thread']
# How long a VM is paused, and what its clock must not jump by.
PAUSE_S, JUMP_S = 8, 2


class Case(NamedTuple):
    """A test; run() raises if it fails.

    kernels: of the hosts it is for; extra: only run if it is asked for.
    """
    name: str
    kernels: List[str]
    run: Callable[[NestedScene], None]
    extra: bool = False


def selftest(scene: NestedScene) -> None:
    """The kernel's own test of the patches, all of it."""
    printed = scene.host.run('/bin/memory_fault_denied_test 2>&1', 120)
    if not any(line.endswith(': ok') for line in printed):
        raise AssertionError('it has tested nothing')
    skipped = [line for line in printed if 'skipped' in line]
    if skipped:
        raise AssertionError(skipped[0])


def selftest_skipped(scene: NestedScene) -> None:
    """A kernel without the patches is noticed."""
    [status] = scene.host.run('/bin/memory_fault_denied_test >/dev/null 2>&1; '
                              'echo $?')
    if int(status) != SKIPPED:
        raise AssertionError(f'status {status}, expected {SKIPPED}: skipped')


def counted_outside(scene: NestedScene) -> None:
    """The kernel and our modules agree about the offsets in their structures.

    What ends KVM_RUN for a signal is not part of the modules.
    """
    vm = scene.start(NestedHardware(vcpus=1))
    vm.wait_boot(BOOT_TIMEOUT)
    [before] = scene.host.run(SIGNAL_EXITS)
    for _ in range(SIGNALS):
        vm.qmp.cmd('stop')
        vm.qmp.cmd('cont')
    [after] = scene.host.run(SIGNAL_EXITS)
    if int(after) - int(before) < SIGNALS // 2:
        raise AssertionError(f'{after} exits for signals, {before} before '
                             f'{SIGNALS} pauses')


def log_is_read(scene: NestedScene) -> None:
    """What the host's kernel warns of is noticed, lockdep still looks."""
    scene.host.run('echo WARNING >/sys/kernel/debug/provoke-crash/DIRECT')
    if not scene.host.trouble():
        raise AssertionError('a warning of the kernel was not noticed')
    [state] = scene.host.run('grep debug_locks /proc/lockdep_stats')
    if not re.search(r':\s+1$', state):
        raise AssertionError(f'lockdep has stopped: {state}')


def qtest(test: str) -> Callable[[NestedScene], None]:
    """The migration tests' boot sector, which fills memory all the time."""
    path = f'/x86_64/migration/background-snapshot/{test}'

    def run(scene: NestedScene) -> None:
        printed = scene.host.run(
            'cd /tmp; QTEST_QEMU_MACHINE_TYPE=pc '
            f'QTEST_QEMU_BINARY={KVM_ONLY} '
            f'migration-test --tap -k -p {path} 2>&1 || true', QTEST_TIMEOUT)
        (scene.logs / 'tap.log').write_text('\n'.join(printed))
        if f'ok 1 {path}' not in printed:
            raise AssertionError(next((p for p in printed if 'ok 1' in p),
                                      printed[-1] if printed else 'no output'))

    return run


def expect_reasons(vm: NestedVM, word: str) -> None:
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


def round_trip(scene: NestedScene, vm: NestedVM, trap: str,
               expected: str = '') -> None:
    """A snapshot; @expected is what trap is really used."""
    snapshot.set_trap(vm, trap)
    scene.round_trip(vm, timeout=SNAPSHOT_TIMEOUT)
    if snapshot.used_trap(vm) != (expected or trap):
        raise AssertionError(f'{trap} took {snapshot.used_trap(vm)}')
    if not snapshot.faults(vm)[-1]:
        raise AssertionError(f'{trap} has trapped no write')


def each_trap(scene: NestedScene) -> None:
    """Each can be, and auto takes the first."""
    vm = scene.boot()
    told = snapshot.traps(vm)
    if list(told) != TRAPS or any(told.values()):
        raise AssertionError(f'not all are available: {told}')
    round_trip(scene, vm, 'auto', TRAPS[0])
    for trap in TRAPS[1:]:
        round_trip(scene, vm, trap)


def auto(scene: NestedScene) -> None:
    round_trip(scene, scene.boot(), 'auto', 'uffd-signal')


def unpatched(scene: NestedScene) -> None:
    """Only uffd-thread can be, and auto takes it."""
    vm = scene.boot()
    expect_reasons(vm, 'KVM')
    round_trip(scene, vm, 'auto', 'uffd-thread')


def ruled_out(cpu: str, word: str) -> Callable[[NestedScene], None]:
    """Something that KVM would write unseen for a guest's CPU."""

    def run(scene: NestedScene) -> None:
        scene.check.pause_us = 10000
        vm = scene.start(NestedHardware(cpu=cpu), '-S')
        expect_reasons(vm, word)

    return run


def clock(trap: str) -> Callable[[NestedScene], None]:
    """The guest's clocks do not jump by the time that the VM was paused.

    KVM tells the guest about it in a page that it writes as a vCPU begins to
    run: if that page is still trapped, the guest goes on with what it was told
    before.
    """

    def run(scene: NestedScene) -> None:
        vm = scene.boot(NestedHardware())
        source = ask(vm, 'cat /sys/devices/system/clocksource/clocksource0/'
                         'current_clocksource')
        if source != 'kvm-clock':
            raise AssertionError(f"the guest's clock is {source}")
        snapshot.set_trap(vm, trap)
        began = time.monotonic()
        before = clocks(vm)
        snapshot.pause(vm)
        time.sleep(PAUSE_S)
        sink, mark, _ = begin(scene, vm)
        after = clocks(vm)
        ran = time.monotonic() - began - PAUSE_S
        for old, new in zip(before, after):
            if not 0 <= new - old < ran + JUMP_S:
                raise AssertionError(f'a clock went from {old} to {new} in at '
                                     f'most {ran:.2f} s')
        expect_active(vm, 'guest runs')
        sink.open()
        snapshot.wait(vm, mark, SNAPSHOT_TIMEOUT)
        scene.prove(vm)

    return run


def clocks(vm: NestedVM) -> List[float]:
    """Seconds, as each vCPU tells."""
    return [float(ask(vm, f"taskset {1 << vcpu} cat /proc/uptime").split()[0])
            for vcpu in range(vm.hardware.vcpus)]


def ask(vm: NestedVM, command: str) -> str:
    """The line that a command in the guest prints."""
    mark = vm.console.mark()
    vm.console.run(f'echo answer $({command})')
    return vm.console.wait('^answer (.*)', mark, 60).group(1)


def hotplug(trap: str) -> Callable[[NestedScene], None]:
    """A vCPU begins to run during a snapshot, and tells KVM its pages."""

    def run(scene: NestedScene) -> None:
        vm = scene.boot()
        snapshot.set_trap(vm, trap)
        online = '/sys/devices/system/cpu/cpu1/online'
        ask(vm, f'echo 0 >{online}; cat {online}')
        sink, mark, frozen = begin(scene, vm)
        for state in ('1', '0', '1'):
            got = ask(vm, f'echo {state} >{online}; cat {online}')
            if got != state:
                raise AssertionError(f'CPU 1 online is {got}, not {state}')
        expect_active(vm, 'CPU 1 is back')
        sink.open()
        snapshot.wait(vm, mark, SNAPSHOT_TIMEOUT)
        scene.prove(vm)
        vm.qmp.cmd('stop')
        scene.prove_image(sink.finish(), vm.hardware, frozen)

    return run


def reboot(trap: str) -> Callable[[NestedScene], None]:
    """The guest reboots during a snapshot."""

    def run(scene: NestedScene) -> None:
        # Without a disk, whose driver fails requests when Linux reboots.
        vm = scene.boot(NestedHardware())
        snapshot.set_trap(vm, trap)
        sink, mark, frozen = begin(scene, vm)
        lines = vm.console.mark()
        vm.console.run('reboot -f')
        vm.wait_boot(BOOT_TIMEOUT, lines)
        expect_active(vm, 'rebooted')
        sink.open()
        snapshot.wait(vm, mark, SNAPSHOT_TIMEOUT)
        scene.check.start(vm)
        scene.check.prove(vm)
        vm.qmp.cmd('stop')
        scene.prove_image(sink.finish(), vm.hardware, frozen)

    return run


def lost_memory(scene: NestedScene) -> None:
    """An access that the host denies, and no trap, ends the guest."""
    file = scene.files / 'ram'
    vm = scene.boot(NestedHardware(ram_file=file))
    scene.host.run(f'truncate -s 32M {file}')
    expect_failed(vm)


def lost_memory_saved(trap: str) -> Callable[[NestedScene], None]:
    """The same while a snapshot is taken, also where nothing is saved yet."""

    def run(scene: NestedScene) -> None:
        file = scene.files / 'ram'
        vm = scene.boot(NestedHardware(ram_file=file))
        snapshot.set_trap(vm, trap)
        begin(scene, vm)
        scene.host.run(f'truncate -s 32M {file}')
        try:
            expect_failed(vm)
        except RuntimeError:
            pass  # SIGBUS: it could not be read in order to be saved

    return run


def expect_failed(vm: NestedVM) -> None:
    """Wait until KVM cannot go on; RuntimeError if QEMU ends."""
    deadline = time.monotonic() + BOOT_TIMEOUT
    while 'kvm run failed' not in vm.output.read_text(errors='replace'):
        if time.monotonic() > deadline:
            raise AssertionError('the guest goes on without its memory')
        vm.assert_alive()
        time.sleep(0.2)


CASES = [
    Case('selftest', ['patched', 'shadow', 'debug'], selftest),
    Case('selftest-skipped', ['control'], selftest_skipped),
    Case('counted-outside', ['patched', 'control'], counted_outside),
    Case('qtest-auto', ['patched', 'control'], qtest('kvm/auto'), extra=True),
    Case('qtest-mprotect', ['debug'], qtest('kvm/mprotect')),
    *(Case(f'qtest-{trap}', ['patched'], qtest(f'kvm/{trap}'), extra=True)
      for trap in TRAPS),
    Case('qtest-memfd', ['patched'], qtest('trap/auto/memfd'), extra=True),
    Case('each-trap', ['patched'], each_trap),
    Case('auto', ['debug'], auto),
    Case('unpatched', ['control'], unpatched),
    Case('hyper-v', ['patched'], ruled_out(
        'max,svm=off,hv-vpindex=on,hv-time=on', 'Hyper-V')),
    Case('svm', ['patched'], ruled_out('max,svm=on', 'svm')),
    *(Case(f'clock-{trap}', ['patched'], clock(trap)) for trap in IN_THREAD),
    Case('own-writes-uffd-signal', ['patched'],
         own_writes('uffd-signal', on_disk=False)),
    Case('own-writes-mprotect', ['patched'],
         own_writes('mprotect', on_disk=True)),
    Case('hotplug', ['patched'], hotplug('uffd-signal')),
    Case('reboot', ['patched'], reboot('mprotect')),
    Case('lost-memory', ['patched', 'control'], lost_memory),
    *(Case(f'lost-memory-{trap}', ['patched'], lost_memory_saved(trap))
      for trap in IN_THREAD),
    Case('log-is-read', ['debug'], log_is_read),
]
