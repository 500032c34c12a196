"""What the guest does while it is measured, and how it is seen.

Each driver starts its program in the guest; next() ends the time before the
snapshot, then that of the snapshot; finish() returns what was measured, for
the measurement's dict.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import re
import time
from typing import Any, Dict, List, Union

from lab.qmp import event_time
from lab.vm import VM

from . import writes
from .rows import Database, KeyValue, Writer

MAX_SAMPLES = 200000
# A port that wlat.c reads to show that it runs.
LIFE = 'port92_read'


class Writes:
    """wlat.c; gives the windows (see writes.py) and guest_freeze_s."""

    def __init__(self, vm: VM, load: Writer):
        self._vm = vm
        self._window = 0
        vm.console.run(f'wlat {load.rate} {load.area_mb} {load.stride} '
                       f'{MAX_SAMPLES} {load.fill_mb} & W=$!')
        vm.console.wait('^wlat window 0', 0, 300)
        self._events = vm.qmp.mark()

    def next(self) -> None:
        self._window += 1
        mark = self._vm.console.mark()
        self._vm.console.run('kill -USR1 $W')
        self._vm.console.wait(f'^wlat window {self._window}', mark, 60)

    def finish(self) -> Dict[str, Any]:
        mark = self._vm.console.mark()
        self._vm.console.run('kill -TERM $W')
        self._vm.console.wait('^wlat end', mark, 60)
        return {'windows': writes.parse(self._vm.console.lines(mark)),
                'guest_freeze_s': self._freeze()}

    def _freeze(self) -> float:
        """Seconds that the guest's program stood still around the STOP event.

        From the last sign of life before it to the first one after it.  The
        program gives one each half millisecond; unlike RESUME, the first one
        comes when the guest has really got on.
        """
        [stop] = [event_time(e) for e in self._vm.qmp.events[self._events:]
                  if e['event'] == 'STOP']
        signs = [float(t) for t in re.findall(
            rf'@(\d+\.\d+):{LIFE} ',
            self._vm.output.read_text(errors='replace'))]
        return (min(t for t in signs if t > stop)
                - max(t for t in signs if t <= stop))


class Operations:
    """database.c or keyvalue.c; gives operations: reports and borders.

    A report is its time, by time.monotonic(), and the number of operations
    that the guest had done by then; borders are the times of next().
    """

    def __init__(self, vm: VM, load: Union[Database, KeyValue]):
        self._vm = vm
        self._borders: List[float] = []
        if isinstance(load, Database):
            command = ('mkdir /db && mount -t ext4 /dev/vda /db && database '
                       f'count /db/rows.db {load.cache_mb}')
        else:
            command = f'keyvalue {load.table_mb}'
        self._mark = vm.console.mark()
        vm.console.run(f'{command} &')
        vm.console.wait('^ops ', self._mark, 120)

    def next(self) -> None:
        self._borders.append(time.monotonic())

    def finish(self) -> Dict[str, Any]:
        console = self._vm.console
        console.check(self._mark)
        lines = console.lines(self._mark)
        reports = [(when, int(line[4:])) for when, line
                   in zip(console.times(self._mark), lines)
                   if re.fullmatch(r'ops \d+', line)]
        return {'operations': {'reports': reports, 'borders': self._borders}}


def start(vm: VM, load: Any) -> Union[Writes, Operations]:
    driver = Writes if isinstance(load, Writer) else Operations
    return driver(vm, load)
