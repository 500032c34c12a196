"""Snapshots of a guest that checks itself; each image must run on clean.

Each write trap with guests at rest and busy, and every way to read a disk.

SPDX-License-Identifier: GPL-2.0-or-later
"""
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional

from ..hardware import Hardware
from ..host import MIB
from ..scene import Case, Scene, acceptance, rounds
from ..sink import ExecSink, FileSink, PipeSink, SocketSink
from ..snapshot import TRAPS
from ..steps import expect_trap
from ..workload import SelfCheck

SINKS: List[Callable] = [FileSink, PipeSink, ExecSink, SocketSink]


def slow_pipe(path) -> PipeSink:
    return PipeSink(path, mb_per_s=60)


@dataclass
class Row:
    """One source VM, `rounds` snapshots in succession.

    trap: one of TRAPS, or auto.
    """
    name: str
    vcpus: int
    write_mb: int = 96
    static_mb: int = 24
    pause_us: int = 0
    aio: str = 'threads'
    iothread: bool = False
    trap: str = 'auto'
    sinks: Optional[List[Callable]] = None
    buffer: Optional[int] = None
    rounds: int = 1

    def run(self, scene: Scene) -> None:
        scene.check = SelfCheck(self.write_mb, self.static_mb, self.pause_us)
        vm = scene.boot(Hardware(
            vcpus=self.vcpus, aio=self.aio, iothread=self.iothread,
            disk=scene.new_disk()))
        if self.trap != 'auto':
            scene.choose_trap(vm, self.trap)
        if self.buffer:
            vm.qmp.cmd('migrate-set-parameters',
                       snapshot_buffer_size=self.buffer)
        sinks = self.sinks or SINKS
        for number in range(self.rounds):
            sink = sinks[number % len(sinks)]
            scene.round_trip(vm, sink(scene.image(f'image{number}')))
            if self.trap != 'auto':
                expect_trap(vm, self.trap)


GUESTS: Dict[str, Dict[str, Any]] = {
    'static-1cpu': {'vcpus': 1, 'write_mb': 0, 'static_mb': 128},
    'static-4cpu': {'vcpus': 4, 'write_mb': 0, 'static_mb': 128},
    'writer-1cpu': {'vcpus': 1},
    'writer-4cpu': {'vcpus': 4},
}
DISKS: Dict[str, Dict[str, Any]] = {
    'threads': {'aio': 'threads'},
    'native': {'aio': 'native'},
    'io-uring': {'aio': 'io_uring'},
    'iothread': {'aio': 'native', 'iothread': True},
}


def combined() -> List[Row]:
    """For acceptance all combinations, otherwise those of a Latin square.

    That has each trap meet each guest and each disk, and each guest meet as
    many disks as there are traps.
    """
    chosen = []
    for t, trap in enumerate(TRAPS):
        for g, (guest, shape) in enumerate(GUESTS.items()):
            for d, (disk, drive) in enumerate(DISKS.items()):
                if acceptance() or (t + g) % len(DISKS) == d:
                    chosen.append(Row(f'{trap}-{guest}-{disk}', trap=trap,
                                      rounds=rounds(), **shape, **drive))
        chosen.append(Row(f'{trap}-small-buffer', 2, trap=trap,
                          sinks=[slow_pipe], buffer=MIB))
    return chosen


ROWS = [
    Row('slow-writer-2cpu', 2, pause_us=1000, sinks=[SocketSink]),
    Row('slow-sink-4cpu', 4, sinks=[slow_pipe]),
    *combined(),
]
CASES = [Case(row.name, row.run) for row in ROWS]
