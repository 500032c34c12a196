"""Takes one measurement: a snapshot of a guest that times its own writes.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import time
from pathlib import Path
from typing import Any, Dict, List

from lab import env, snapshot
from lab.sink import FileSink, PipeSink
from lab.vm import VM, Hardware

from .cpu import OtherLoad
from .rows import Row, Variant

WINDOWS = ('before', 'during', 'after')
QUIET_S = 4
MAX_SAMPLES = 200000
TOTALS = 'background_snapshot_end'


def measure(row: Row, variant: Variant, folder: Path) -> Dict[str, Any]:
    """One snapshot; logs go to @folder.

    Returns seconds, freeze_s, downtime_ms, image_bytes, totals (what ours
    traces at the end), other_cpus (see OtherLoad) and, for each window
    (before, during and after the snapshot), what the guest has measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    image = env.LAB / 'bench-image'
    hardware = Hardware(vcpus=row.vcpus, ram_mb=row.ram_mb)
    trace = ['-trace', TOTALS] if variant.patched else []
    with VM(variant.binary, hardware, folder / 'guest', *trace) as vm:
        vm.wait_boot()
        if row.buffer and variant.patched:
            vm.qmp.cmd('migrate-set-parameters',
                       snapshot_buffer_size=row.buffer)
        vm.console.run(f'wlat {row.rate} {row.area_mb} {MAX_SAMPLES} & W=$!')
        vm.console.wait('^wlat window 0', 0, 60)
        time.sleep(QUIET_S)
        _next_window(vm, 1)
        sink = (PipeSink(image, row.sink_mb_s) if row.sink_mb_s
                else FileSink(image))
        # Both stop the VM themselves for the device state and resume it.
        others = OtherLoad(vm.process.pid)
        taken = snapshot.take(vm, sink, stop=False, timeout=300)
        other_cpus = others.cpus()
        _next_window(vm, 2)
        sink.finish()
        time.sleep(QUIET_S)
        mark = vm.console.mark()
        vm.console.run('kill -TERM $W')
        vm.console.wait('^wlat end', mark, 60)
        windows = _parse(vm.console.lines(mark))
        image_bytes = image.stat().st_size
        image.unlink()
        totals = ' '.join(vm.traced(TOTALS))
    return {
        'row': row.name, 'variant': variant.name, 'seconds': taken.seconds,
        'freeze_s': taken.freeze, 'downtime_ms': taken.info.get('downtime'),
        'image_bytes': image_bytes, 'windows': windows,
        'totals': totals, 'other_cpus': other_cpus,
    }


def _next_window(vm: VM, number: int) -> None:
    mark = vm.console.mark()
    vm.console.run('kill -USR1 $W')
    vm.console.wait(f'^wlat window {number}', mark, 60)


def _parse(lines: List[str]) -> Dict[str, Any]:
    """What wlat.c prints at its end; raises if a number got lost."""
    windows: Dict[str, Any] = {}
    expected: Dict[str, int] = {}
    name = ''
    for line in lines:
        words = line.split()
        if words[:2] == ['wlat', 'n']:
            name = WINDOWS[int(words[2])]
            windows[name] = {'seconds': float(words[3]),
                             'writes': int(words[4]),
                             'samples_ns': [], 'per_100ms': []}
            expected[name] = int(words[5])
        elif words[:2] == ['wlat', 's']:
            windows[name]['samples_ns'] += map(int, words[2:])
        elif words[:2] == ['wlat', 'r']:
            windows[name]['per_100ms'] += map(int, words[2:])
    for name, count in expected.items():
        got = len(windows[name]['samples_ns'])
        if got != count:
            raise RuntimeError(f'{got} samples of window {name} arrived, '
                               f'the guest sent {count}')
    if tuple(windows) != WINDOWS:
        raise RuntimeError(f'windows {list(windows)} instead of {WINDOWS}')
    return windows
