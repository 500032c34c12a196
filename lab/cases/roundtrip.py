"""Snapshots of a guest that checks itself; each image must run on clean.

SPDX-License-Identifier: GPL-2.0-or-later
"""
from dataclasses import dataclass
from typing import Callable, List, Optional

from .. import snapshot
from ..scene import Case, Scene
from ..sink import ExecSink, FileSink, PipeSink, SocketSink
from ..vm import Hardware
from ..workload import SelfCheck

MIB = 1 << 20
SINKS: List[Callable] = [FileSink, PipeSink, ExecSink, SocketSink]


def slow_pipe(path) -> PipeSink:
    return PipeSink(path, mb_per_s=60)


@dataclass
class Row:
    """One source VM, `rounds` snapshots in succession.

    trap: one of traps.TRAPS, or auto.
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
            used = snapshot.used_trap(vm)
            if self.trap not in ('auto', used):
                raise AssertionError(f'{self.trap} was chosen, {used} used')


ROWS = [
    Row('slow-writer-2cpu', 2, pause_us=1000, sinks=[SocketSink]),
    Row('slow-sink-4cpu', 4, sinks=[slow_pipe]),
]
CASES = [Case(row.name, row.run) for row in ROWS]
