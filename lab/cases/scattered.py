"""Writes all over a large guest, where mprotect() runs out of mappings.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import time
from pathlib import Path

from .. import host, snapshot
from ..hardware import Hardware
from ..host import MIB
from ..scene import Case, Scene
from ..sink import PipeSink
from ..steps import expect_mappings
from ..workload import SelfCheck

# The first write to every 32nd page is saved with what is around it and
# leaves an island.  When there may be no more of those, each further page is a
# fault of its own.  A slow sink keeps the scanner from being faster.
STRIDE = 32
WRITE_MB, RAM_MB = 3200, 3700
# Several times as many as there can be islands.
FAULTS = 4 * (WRITE_MB << 8) // STRIDE
BUFFER_MB, SINK_MB_S = 1, 80
MAX_MAP_COUNT = Path('/proc/sys/vm/max_map_count')
DEFAULT_MAX_MAP_COUNT = 65530
# So many that there is no doubt: the trap had to do without new ones.
MANY = 40000


def scattered(scene: Scene) -> None:
    host.change(scene, MAX_MAP_COUNT, str(DEFAULT_MAX_MAP_COUNT))
    scene.check = SelfCheck(WRITE_MB, static_mb=0, stride=STRIDE, proof=1)
    vm = scene.boot(Hardware(vcpus=2, ram_mb=RAM_MB))
    scene.choose_trap(vm, 'mprotect')
    vm.qmp.cmd('migrate-set-parameters',
               snapshot_buffer_size=BUFFER_MB * MIB)
    before = peak = vm.process.mappings()
    sink = PipeSink(scene.image(), SINK_MB_S)
    scene.pause(vm)
    mark = snapshot.start(vm, sink)
    while vm.qmp.cmd('query-migrate')['status'] in ('setup', 'active'):
        peak = max(peak, vm.process.mappings())
        time.sleep(0.1)
    snapshot.wait(vm, mark)
    faults = snapshot.figures(vm)['trapped-writes']
    scene.note(f'{faults} faults, at most {peak} mappings')
    if faults < FAULTS or peak < MANY:
        raise AssertionError(f'{faults} faults and {peak} mappings are too '
                             'few to show anything')
    expect_mappings(vm, before)
    scene.prove(vm)
    vm.qmp.cmd('stop')
    scene.prove_image(sink.finish(), vm.hardware)


CASES = [Case('mprotect-scattered', scattered, extra=True)]
