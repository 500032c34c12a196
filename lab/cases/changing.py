"""RAM that is given back, plugged in or unplugged during a snapshot.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import time
from pathlib import Path

from .. import snapshot
from ..hardware import Hardware
from ..host import MIB
from ..memory import BOOT_MB
from ..scene import Case, Scene
from ..sink import PipeSink
from ..steps import Begun, begin, expect_active, refused, wait_until
from ..vm import VM
from ..workload import SelfCheck

# In the image they are in use, while the guest that runs on frees them.
FREED_MB = 200
RAM_MB = 448
PLUG_MB = 512
SLOW_MB_S = 12
BALLOON = 'virtio-balloon-pci,id=balloon'


def expect_given_back(vm: VM, before: int) -> None:
    """Most of what the guest has freed is the host's again."""
    wait_until(f'{FREED_MB} MiB given back', lambda:
               before - vm.process.memory_used() > 0.8 * FREED_MB * MIB)


def boot(scene: Scene, hardware: Hardware) -> VM:
    """A guest that uses FREED_MB."""
    scene.check = SelfCheck(write_mb=16, static_mb=FREED_MB)
    return scene.boot(hardware)


def begin_slowly(scene: Scene, vm: VM) -> Begun:
    return begin(scene, vm, PipeSink(scene.image(), SLOW_MB_S))


def free(vm: VM) -> None:
    """Have the guest end its workload."""
    since = vm.console.mark()
    vm.console.run('killall -9 selfcheck; sleep 0.5; echo freed')
    vm.console.wait('^freed', since, 30)


def prove_both(scene: Scene, vm: VM, image: Path) -> None:
    """The guest works anew with all its memory, and the image as before."""
    scene.check.start(vm)
    scene.prove(vm)
    scene.prove_image(image, vm.hardware)


def balloon(scene: Scene) -> None:
    """The guest gives back memory that the image is still to get.

    There is room for copies of it, so that it need not wait for the sink.
    """
    vm = boot(scene, Hardware(ram_mb=RAM_MB, devices=(BALLOON,)))
    vm.qmp.cmd('migrate-set-parameters',
               snapshot_buffer_size=RAM_MB // 2 * MIB)
    begun = begin_slowly(scene, vm)
    used = vm.process.memory_used()
    free(vm)
    vm.qmp.cmd('balloon', value=(RAM_MB - FREED_MB) * MIB)
    wait_until('balloon inflated', lambda: vm.qmp.cmd('query-balloon')
               ['actual'] == (RAM_MB - FREED_MB) * MIB)
    expect_active(vm, 'balloon inflated')
    begun.sink.full_speed()
    snapshot.wait(vm, begun.mark)
    expect_given_back(vm, used)
    vm.qmp.cmd('balloon', value=RAM_MB * MIB)
    wait_until('balloon deflated', lambda: vm.qmp.cmd('query-balloon')
               ['actual'] == RAM_MB * MIB)
    prove_both(scene, vm, begun.sink.finish())
    scene.round_trip(vm)


def free_page_reporting(scene: Scene) -> None:
    """Linux reports what it has freed, seconds later, without being asked.

    The first time shows that it does.
    """
    hardware = Hardware(ram_mb=RAM_MB,
                        devices=(f'{BALLOON},free-page-reporting=on',))
    vm = boot(scene, hardware)
    used = vm.process.memory_used()
    free(vm)
    expect_given_back(vm, used)

    scene.check.start(vm)
    # Room for what Linux writes meanwhile; the scanner has little of it.
    vm.qmp.cmd('migrate-set-parameters', snapshot_buffer_size=48 * MIB)
    begun = begin_slowly(scene, vm)
    free(vm)
    time.sleep(4)
    expect_active(vm, 'pages reported')
    begun.sink.full_speed()
    snapshot.wait(vm, begun.mark)
    prove_both(scene, vm, begun.sink.finish())
    scene.round_trip(vm)


def virtio_mem(scene: Scene) -> None:
    """The guest cannot unplug any before the end; then it can, and plug."""
    vm = boot(scene, Hardware(ram_mb=BOOT_MB + PLUG_MB, memory='virtio-mem'))
    begun = begin_slowly(scene, vm)

    def request(mib: int) -> None:
        vm.qmp.cmd('qom-set', path='vmem', property='requested-size',
                   value=mib * MIB)

    def size() -> int:
        return vm.qmp.cmd('qom-get', path='vmem', property='size') // MIB

    request(PLUG_MB // 2)
    time.sleep(2)
    scene.check.moves(vm)
    expect_active(vm, 'less requested')
    begun.sink.full_speed()
    if size() != PLUG_MB:
        raise AssertionError(f'{size()} MiB plugged in during the snapshot')
    snapshot.wait(vm, begun.mark)
    # The guest would try again, but later and later; so give it a reason.
    request(PLUG_MB // 2 + 16)
    wait_until('unplugged', lambda: size() == PLUG_MB // 2 + 16)
    request(PLUG_MB * 3 // 2)
    wait_until('plugged', lambda: size() == PLUG_MB * 3 // 2)
    scene.prove(vm)
    scene.prove_image(begun.sink.finish(), vm.hardware)


def dimm(scene: Scene) -> None:
    """Devices come and go after the snapshot; a backend may come at once."""
    vm = boot(scene, Hardware(ram_mb=BOOT_MB + PLUG_MB, memory='dimm'))
    begun = begin_slowly(scene, vm)
    vm.qmp.cmd('object-add', qom_type='memory-backend-ram', id='late',
               size=PLUG_MB * MIB)
    late = {'driver': 'pc-dimm', 'id': 'late-dimm', 'memdev': 'late'}
    refused('a DIMM', 'migrating', lambda: vm.qmp.cmd('device_add', **late))
    refused('removing one', 'migrating',
            lambda: vm.qmp.cmd('device_del', id='dimm'))
    scene.check.moves(vm)
    expect_active(vm, 'a DIMM was refused')
    begun.sink.full_speed()
    snapshot.wait(vm, begun.mark)
    vm.qmp.cmd('device_add', **late)
    since = vm.console.mark()
    vm.console.run('until [ $(awk "/MemTotal/{print \\$2}" /proc/meminfo) -gt '
                   f'{(BOOT_MB + PLUG_MB) << 10} ]; do sleep 0.2; done; '
                   'echo plugged')
    vm.console.wait('^plugged', since, 30)
    scene.prove(vm)
    scene.prove_image(begun.sink.finish(), vm.hardware)


CASES = [
    Case('balloon', balloon),
    Case('free-page-reporting', free_page_reporting),
    Case('virtio-mem-resize', virtio_mem),
    Case('dimm-hotplug', dimm),
]
