"""Takes one measurement: a snapshot of a guest that does something.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import shutil
import time
from pathlib import Path
from typing import Any, Dict, List

from lab import disk, env, snapshot
from lab.hardware import Hardware
from lab.sink import FileSink, PipeSink
from lab.vm import VM, boot

from . import loads
from .cpu import OtherLoad
from .memory import Memory
from .rows import Database, Row, Variant, Writer

DISK, DISK_MB = env.LAB / 'bench-disk.qcow2', 512
# When QEMU's memory is looked at after the snapshot.
LOOKS_S = (5, 30)
# What the host needs for everything else.
SPARE_MB = 2048
TOTALS = 'background_snapshot_end'
TMPFS = Path('/dev/shm')


class Unavailable(Exception):
    """This machine or QEMU cannot do it."""


def measure(row: Row, variant: Variant, folder: Path) -> Dict[str, Any]:
    """One snapshot; logs go to @folder.

    Returns seconds, freeze_s (from STOP to RESUME), image_bytes, memory (see
    memory.py), totals (what ours traces at the end), sink_cpu_s (what the
    sink took of a CPU), other_cpus (see OtherLoad) and what the load's driver
    has measured (see loads.py).
    """
    folder.mkdir(parents=True, exist_ok=True)
    _needs_memory(row.ram_mb)
    image = _folder(row) / 'bench-image'
    with boot(lambda: _vm(row, variant, folder)) as vm:
        # If memory runs out after all, nobody else is to be killed for it.
        Path(f'/proc/{vm.process.pid}/oom_score_adj').write_text('1000')
        if variant.trap:
            _set_parameters(vm, row, variant.trap)
        load = loads.start(vm, row.load)
        memory = Memory(vm)
        time.sleep(row.before_s)
        sink = (PipeSink(Path('/dev/null'), row.sink_mb_s, row.burst_ms)
                if row.sink_mb_s else FileSink(image))
        memory.look('before')
        others = OtherLoad(vm.process.pid)
        load.next()
        # Both stop the VM themselves for the device state and resume it.
        taken = snapshot.take(vm, sink, timeout=300)
        load.next()
        ended = time.monotonic()
        other_cpus = others.cpus(_own_cpu_s(sink))
        memory.look('end')
        for after_s in LOOKS_S:
            if after_s < row.after_s:
                time.sleep(max(0, ended + after_s - time.monotonic()))
                memory.look(f'{after_s}_s_after')
        time.sleep(max(0, ended + row.after_s - time.monotonic()))
        measured = load.finish()
        measured['memory'] = memory.finish()
        totals = ' '.join(vm.traced(TOTALS))
    DISK.unlink(missing_ok=True)
    return {
        'row': row.name, 'variant': variant.name, 'seconds': taken.seconds,
        'freeze_s': taken.freeze, 'downtime_ms': taken.info.get('downtime'),
        'image_bytes': _size(sink), 'totals': totals,
        'sink_cpu_s': _own_cpu_s(sink), 'other_cpus': other_cpus, **measured,
    }


def _folder(row: Row) -> Path:
    if not row.in_tmpfs:
        return env.LAB
    if shutil.disk_usage(TMPFS).free < row.ram_mb << 20:
        raise Unavailable(f'{row.ram_mb} MiB are needed in {TMPFS}')
    return TMPFS


def _needs_memory(ram_mb: int) -> None:
    [kb] = [int(line.split()[1]) for line
            in Path('/proc/meminfo').read_text().splitlines()
            if line.startswith('MemAvailable:')]
    if kb // 1024 < ram_mb + SPARE_MB:
        raise Unavailable(f'{ram_mb + SPARE_MB} MiB of memory are needed')


def _vm(row: Row, variant: Variant, folder: Path) -> VM:
    hardware = Hardware(vcpus=row.vcpus, ram_mb=row.ram_mb)
    more: List[str] = ['-msg', 'timestamp=on']
    if isinstance(row.load, Database):
        hardware.disk = disk.new_ext4(DISK, DISK_MB)
    if isinstance(row.load, Writer):
        more += ['-trace', loads.LIFE]
    if variant.trap:
        more += ['-trace', TOTALS]
    return VM(variant.binary, hardware, folder / 'guest', *more)


def _set_parameters(vm: VM, row: Row, trap: str) -> None:
    reason = snapshot.traps(vm)[trap]
    if reason:
        raise Unavailable(reason)
    snapshot.set_trap(vm, trap)
    if row.buffer_mb:
        vm.qmp.cmd('migrate-set-parameters',
                   snapshot_buffer_size=row.buffer_mb << 20)


def _own_cpu_s(sink) -> float:
    if isinstance(sink, FileSink):
        return 0
    sink.finish()
    return sink.cpu_s


def _size(sink) -> int:
    """Of the image, which is thrown away."""
    if isinstance(sink, PipeSink):
        return sink.received
    size = sink.path.stat().st_size
    sink.path.unlink()
    return size
