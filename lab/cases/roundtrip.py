"""Snapshots of a guest that checks itself; each image must run on clean.

SPDX-License-Identifier: GPL-2.0-or-later
"""
from dataclasses import dataclass
from typing import Callable, List, Optional

from ..scene import Case, Scene, rounds
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

    Those that are asked for 20 times take their number from ROUNDS.
    """
    name: str
    vcpus: int
    write_mb: int = 96
    static_mb: int = 24
    pause_us: int = 0
    disk: bool = True
    aio: str = 'threads'
    memory: str = 'plain'
    sinks: Optional[List[Callable]] = None
    buffer: Optional[int] = None
    rounds: int = 1
    follows_rounds: bool = False

    def run(self, scene: Scene) -> None:
        scene.check = SelfCheck(self.write_mb, self.static_mb, self.pause_us)
        vm = scene.boot(Hardware(
            vcpus=self.vcpus, memory=self.memory, aio=self.aio,
            disk=scene.new_disk() if self.disk else None))
        if self.buffer:
            vm.qmp.cmd('migrate-set-parameters',
                       snapshot_buffer_size=self.buffer)
        sinks = self.sinks or SINKS
        number_of_rounds = rounds(self.rounds) if self.follows_rounds \
            else self.rounds
        for number in range(number_of_rounds):
            sink = sinks[number % len(sinks)]
            scene.round_trip(vm, sink(scene.image(f'image{number}')))


ROWS = [
    Row('static-1cpu', 1, write_mb=0, static_mb=128,
        follows_rounds=True),
    Row('static-4cpu', 4, write_mb=0, static_mb=128,
        follows_rounds=True),
    Row('writer-1cpu', 1, rounds=2, follows_rounds=True),
    Row('writer-4cpu', 4, rounds=2, follows_rounds=True),
    Row('slow-writer-2cpu', 2, pause_us=1000, sinks=[SocketSink]),
    Row('slow-sink-4cpu', 4, sinks=[slow_pipe]),
    Row('small-buffer-2cpu', 2, sinks=[slow_pipe], buffer=MIB),
    Row('disk-native', 1, write_mb=64, aio='native'),
    Row('disk-io-uring', 1, write_mb=64, aio='io_uring'),
    Row('two-ram-blocks', 2, memory='two', disk=False),
    Row('memfd-shared', 2, memory='memfd'),
]
CASES = [Case(row.name, row.run) for row in ROWS]
