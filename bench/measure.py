"""Takes one measurement: the RAM of a guest that does something is saved.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import os
import shutil
import time
from pathlib import Path
from typing import Any, Dict, List, Union

from lab import disk, env
from lab.hardware import Hardware
from lab.place import HERE
from lab.sink import FileSink, PipeSink
from lab.vm import VM, boot

from . import loads, ways
from .cpu import Cpu
from .memory import Memory
from .rows import Database, Row, Variant, Writer
from .ways import Unavailable

DISK, DISK_MB = env.LAB / 'bench-disk.qcow2', 512
# When QEMU's memory is looked at after the snapshot.
LOOKS_S = (5, 30)
# What the host needs for everything else.
SPARE_MB = 2048
TMPFS = Path('/dev/shm')
WITHOUT_THP = Path(__file__).resolve().with_name('without-thp')


def measure(row: Row, variant: Variant, folder: Path, dd_bytes: int = 0
            ) -> Dict[str, Any]:
    """Save the RAM once; logs go to @folder.

    Returns seconds, image_bytes (what it occupies), page_bytes (what of it is
    pages) and, unless dd did it, freeze_s (from STOP to RESUME), figures (what
    query-migrate tells of a snapshot of ours), memory (see memory.py),
    sink_cpu_s (what the sink took of a CPU), cpu (see cpu.py) and what the
    load's driver has measured (see loads.py).

    @dd_bytes: what dd is to write; 0: that is not known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    image = _folder(row) / 'bench-image'
    named = {'row': row.name, 'variant': variant.name, 'how': variant.how,
             'whole': row.whole}
    if variant.how == 'dd':
        if not dd_bytes:
            raise Unavailable('no image of this row was measured before')
        _needs_memory(dd_bytes >> 20)
        return {**named, **ways.dd(image, dd_bytes, variant.format.direct,
                                   TMPFS / 'bench-source')}
    _needs_memory(row.ram_mb)
    image.unlink(missing_ok=True)
    try:
        return {**named, **_measure_vm(row, variant, folder, image)}
    finally:
        image.unlink(missing_ok=True)
        DISK.unlink(missing_ok=True)


def _measure_vm(row: Row, variant: Variant, folder: Path, image: Path
                ) -> Dict[str, Any]:
    with boot(lambda: _vm(row, variant, folder)) as vm:
        # If memory runs out after all, nobody else is to be killed for it.
        Path(f'/proc/{vm.process.pid}/oom_score_adj').write_text('1000')
        ways.configure(vm, row, variant)
        load = loads.start(vm, row.load)
        memory = Memory(vm)
        # What measurements before have left to write would disturb this one.
        os.sync()
        time.sleep(row.before_s)
        sink: Union[FileSink, PipeSink] = FileSink(image)
        if variant.how == 'savevm':
            sink = FileSink(DISK)
        elif row.sink_mb_s:
            sink = PipeSink(Path('/dev/null'), row.sink_mb_s, row.burst_ms)
        occupied = _occupied(sink)
        memory.look('before')
        cpu = Cpu(vm.process.pid)
        load.next()
        taken = ways.save(vm, row, variant, sink)
        load.next()
        ended = time.monotonic()
        sink.finish()
        sink_s = sink.cpu_s if isinstance(sink, PipeSink) else 0
        used = cpu.used(sink_s)
        image_bytes = _occupied(sink) - occupied
        memory.look('end')
        for after_s in LOOKS_S:
            if after_s < row.after_s:
                time.sleep(max(0, ended + after_s - time.monotonic()))
                memory.look(f'{after_s}_s_after')
        time.sleep(max(0, ended + row.after_s - time.monotonic()))
        measured = load.finish()
        measured['memory'] = memory.finish()
    ram = taken.info.get('ram', {})
    return {
        'seconds': taken.seconds, 'freeze_s': taken.freeze,
        'downtime_ms': taken.info.get('downtime'),
        'figures': taken.info.get('background-snapshot'),
        'image_bytes': image_bytes,
        'page_bytes': ram.get('normal-bytes') or image_bytes,
        'sink_cpu_s': sink_s, 'cpu': used, **measured,
    }


def _folder(row: Row) -> Path:
    if not row.in_tmpfs:
        return env.LAB
    if shutil.disk_usage(TMPFS).free < row.ram_mb << 20:
        raise Unavailable(f'{row.ram_mb} MiB are needed in {TMPFS}')
    return TMPFS


def _needs_memory(mb: int) -> None:
    [kb] = [int(line.split()[1]) for line
            in Path('/proc/meminfo').read_text().splitlines()
            if line.startswith('MemAvailable:')]
    if kb // 1024 < mb + SPARE_MB:
        raise Unavailable(f'{mb + SPARE_MB} MiB of memory are needed')


def _vm(row: Row, variant: Variant, folder: Path) -> VM:
    hardware = Hardware(vcpus=row.vcpus, ram_mb=row.ram_mb)
    more: List[str] = ['-msg', 'timestamp=on', '-name',
                       'bench,debug-threads=on']
    if isinstance(row.load, Database):
        hardware.disk = disk.new_ext4(DISK, DISK_MB)
    elif variant.how == 'savevm':
        hardware.disk = disk.new(HERE, DISK, DISK_MB)
    if isinstance(row.load, Writer):
        more += ['-trace', loads.LIFE]
    launcher = [] if row.thp else [str(WITHOUT_THP)]
    if row.cores:
        cores = sorted(os.sched_getaffinity(0))[-row.cores:]
        launcher += ['taskset', '-c', ','.join(map(str, cores))]
    return VM(variant.binary, hardware, folder / 'guest', *more,
              launcher=launcher)


def _occupied(sink: Union[FileSink, PipeSink]) -> int:
    """How many bytes it has, without holes."""
    if isinstance(sink, PipeSink):
        return sink.received
    return sink.path.stat().st_blocks * 512 if sink.path.exists() else 0
