"""Takes one measurement: a snapshot of a guest that times its own writes.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import re
import time
from pathlib import Path
from typing import Any, Dict

from lab import env, snapshot
from lab.qmp import event_time
from lab.sink import FileSink
from lab.vm import VM, Hardware, boot

from . import writes
from .cpu import OtherLoad
from .rows import Row, Variant
from .sink import BurstSink

QUIET_S = 3
MAX_SAMPLES = 200000
TOTALS = 'background_snapshot_end'
# A port that wlat.c reads to show that it runs.
LIFE = 'port92_read'


class Unavailable(Exception):
    """This machine or QEMU does not have the variant's write trap."""


def measure(row: Row, variant: Variant, folder: Path) -> Dict[str, Any]:
    """One snapshot; logs go to @folder.

    Returns seconds, freeze_s (from STOP to RESUME), guest_freeze_s (see
    _guest_freeze), image_bytes, totals (what ours traces at the end),
    other_cpus (see OtherLoad) and the windows before, during and after the
    snapshot (see writes.py).
    """
    folder.mkdir(parents=True, exist_ok=True)
    image = env.LAB / 'bench-image'
    hardware = Hardware(vcpus=row.vcpus, ram_mb=row.ram_mb)
    more = ['-msg', 'timestamp=on', '-trace', LIFE]
    if variant.trap:
        more += ['-trace', TOTALS]
    with boot(lambda: VM(variant.binary, hardware, folder / 'guest',
                         *more)) as vm:
        if variant.trap:
            _set_parameters(vm, row, variant.trap)
        vm.console.run(f'wlat {row.rate} {row.area_mb} {row.stride} '
                       f'{MAX_SAMPLES} & W=$!')
        vm.console.wait('^wlat window 0', 0, 60)
        time.sleep(QUIET_S)
        sink = (BurstSink(row.sink_mb_s, row.burst_ms) if row.sink_mb_s
                else FileSink(image))
        events = vm.qmp.mark()
        others = OtherLoad(vm.process.pid)
        _next_window(vm, 1)
        # Both stop the VM themselves for the device state and resume it.
        taken = snapshot.take(vm, sink, stop=False, timeout=300)
        _next_window(vm, 2)
        other_cpus = others.cpus()
        image_bytes = _finish(sink)
        time.sleep(QUIET_S)
        mark = vm.console.mark()
        vm.console.run('kill -TERM $W')
        vm.console.wait('^wlat end', mark, 60)
        windows = writes.parse(vm.console.lines(mark))
        guest_freeze = _guest_freeze(vm, events)
        totals = ' '.join(vm.traced(TOTALS))
    return {
        'row': row.name, 'variant': variant.name, 'seconds': taken.seconds,
        'freeze_s': taken.freeze, 'guest_freeze_s': guest_freeze,
        'downtime_ms': taken.info.get('downtime'),
        'image_bytes': image_bytes, 'windows': windows,
        'totals': totals, 'other_cpus': other_cpus,
    }


def _set_parameters(vm: VM, row: Row, trap: str) -> None:
    for known in vm.qmp.cmd('query-snapshot-write-traps'):
        if known['trap'] == trap and not known['available']:
            raise Unavailable(known['reason'])
    vm.qmp.cmd('migrate-set-parameters', snapshot_write_trap=trap)
    if row.buffer_mb:
        vm.qmp.cmd('migrate-set-parameters',
                   snapshot_buffer_size=row.buffer_mb << 20)


def _next_window(vm: VM, number: int) -> None:
    mark = vm.console.mark()
    vm.console.run('kill -USR1 $W')
    vm.console.wait(f'^wlat window {number}', mark, 60)


def _finish(sink) -> int:
    """The size of the image, which is thrown away."""
    if isinstance(sink, BurstSink):
        return sink.finish()
    size = sink.path.stat().st_size
    sink.path.unlink()
    return size


def _guest_freeze(vm: VM, since: int) -> float:
    """Seconds that the guest's program stood still around the STOP event.

    From the last sign of life before it to the first one after it.  The
    program gives one each half millisecond; unlike RESUME, the first one
    comes when the guest has really got on.
    """
    [stop] = [event_time(e) for e in vm.qmp.events[since:]
              if e['event'] == 'STOP']
    signs = [float(t) for t in re.findall(
        rf'@(\d+\.\d+):{LIFE} ', vm.output.read_text(errors='replace'))]
    return (min(t for t in signs if t > stop)
            - max(t for t in signs if t <= stop))
