"""The workflow of a background snapshot, step by step, and restoring.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Optional

from .format import STREAM, Format
from .hardware import Hardware
from .place import HERE, Place
from .qmp import event_time
from .vm import VM

CAPABILITIES = ('events', 'background-snapshot')
# All write traps, in the order in which auto takes them.
TRAPS = ('uffd-signal', 'mprotect', 'uffd-thread')
TIMEOUT_S = 120
FINAL = ('completed', 'failed', 'cancelled')


class SnapshotFailed(Exception):
    """The migration ended, but not as `completed`"""


@dataclass
class Result:
    """Times in seconds; info is the final answer of query-migrate."""
    seconds: float
    freeze: Optional[float]
    info: Dict[str, Any]


def pause(vm: VM) -> None:
    """Step 1."""
    vm.qmp.cmd('stop')


def inserted(vm: VM) -> Dict[str, Any]:
    """What QEMU tells of the image that the VM's only disk is now."""
    [found] = [device['inserted'] for device in vm.qmp.cmd('query-block')
               if device.get('inserted')]
    return found


def snapshot_disk(vm: VM, overlay: Path) -> Path:
    """Step 2: put an overlay over the disk and return the frozen image."""
    disk = inserted(vm)
    vm.qmp.cmd('blockdev-snapshot-sync', node_name=disk['node-name'],
               snapshot_file=str(overlay), format='qcow2',
               snapshot_node_name=f'overlay-{time.monotonic_ns()}')
    return Path(disk['file'])


def enable(vm: VM, image_format: Format = STREAM) -> None:
    """Step 3."""
    image_format.choose(vm)
    vm.qmp.cmd('migrate-set-capabilities', capabilities=[
        {'capability': c, 'state': True} for c in CAPABILITIES])


def set_trap(vm: VM, trap: str) -> None:
    """Choose the write trap; one that cannot be is refused by step 3 or 4."""
    vm.qmp.cmd('migrate-set-parameters', snapshot_write_trap=trap)


def traps(vm: VM) -> Dict[str, str]:
    """Why @vm cannot have a write trap ('': it can), in the order of auto."""
    return {t['trap']: '' if t['available'] else t['reason']
            for t in vm.qmp.cmd('query-snapshot-write-traps')}


def figures(vm: VM) -> Dict[str, Any]:
    """Of the snapshot that is being taken, or of the last one."""
    return vm.qmp.cmd('query-migrate')['background-snapshot']


def start(vm: VM, sink) -> int:
    """Step 4: begin to save the RAM.  Returns the mark for wait()."""
    mark = vm.qmp.mark()
    vm.qmp.cmd('migrate', uri=sink.uri(vm))
    return mark


def wait(vm: VM, mark: int, timeout: float = TIMEOUT_S) -> Dict[str, Any]:
    """Step 5: wait for the migration's last event.

    Returns query-migrate's answer; anything but `completed` raises
    SnapshotFailed with QEMU's reason.
    """
    event = vm.qmp.wait_event(
        mark, 'end of the migration',
        lambda e: e['event'] == 'MIGRATION' and e['data']['status'] in FINAL,
        timeout * vm.place.patience)
    info = vm.qmp.cmd('query-migrate')
    if event['data']['status'] != 'completed':
        raise SnapshotFailed(f'{event["data"]["status"]}: '
                             + info.get('error-desc', 'no reason given'))
    return info


def take(vm: VM, sink, timeout: float = TIMEOUT_S) -> Result:
    """Steps 3 to 5, of a VM that runs: it is stopped and resumed for it."""
    mark = vm.qmp.mark()
    enable(vm)
    began = time.monotonic()
    info = wait(vm, start(vm, sink), timeout)
    return Result(time.monotonic() - began, freeze(vm, mark), info)


def freeze(vm: VM, mark: int) -> Optional[float]:
    """Seconds from the first STOP to the first RESUME after the mark."""
    vm.qmp.mark()
    stop = [e for e in vm.qmp.events[mark:] if e['event'] == 'STOP']
    resume = [e for e in vm.qmp.events[mark:] if e['event'] == 'RESUME']
    if not stop or not resume:
        return None
    return event_time(resume[0]) - event_time(stop[0])


def restore(image: Path, hardware: Hardware, log: Path, place: Place = HERE,
            image_format: Format = STREAM) -> VM:
    """Restore an image in the unmodified QEMU and let the guest run on."""
    vm = VM(place.stock, hardware, log, '-incoming', 'defer', place=place)
    try:
        image_format.choose(vm)
        _load(vm, image, image_format)
    except BaseException:
        vm.close()
        raise
    return vm


def _load(vm: VM, image: Path, image_format: Format) -> None:
    vm.qmp.cmd('migrate-set-capabilities', capabilities=[
        {'capability': 'events', 'state': True}])
    mark = vm.qmp.mark()
    vm.qmp.cmd('migrate-incoming', uri=image_format.uri(str(image)),
               exit_on_error=False)
    try:
        wait(vm, mark)
    except Exception as problem:
        vm.assert_alive()
        raise SnapshotFailed(f'restoring {image.name}: {problem}'
                             ) from problem
    if vm.status() != 'running':
        raise SnapshotFailed(f'restored VM is {vm.status()}')
