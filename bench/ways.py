"""The ways to save a VM's RAM that are compared; see rows.Variant.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import os
import subprocess
import time
from pathlib import Path
from typing import Any, Dict

from lab import snapshot
from lab.qmp import ExecuteError
from lab.snapshot import Result, SnapshotFailed
from lab.vm import VM

from .rows import Row, Variant

TIMEOUT_S = 300
# A snapshot that is not to end by itself is cancelled so long after RESUME.
CANCEL_S = 0.5
BLOCK = 1 << 20


class Unavailable(Exception):
    """This machine or QEMU cannot do it."""


def configure(vm: VM, row: Row, variant: Variant) -> None:
    """Set capabilities and parameters; raises Unavailable if refused."""
    parameters: Dict[str, Any] = {'max_bandwidth': 0}
    if variant.trap:
        parameters['snapshot_write_trap'] = variant.trap
        if row.buffer_mb:
            parameters['snapshot_buffer_size'] = row.buffer_mb << 20
    wanted = {'events': True, 'background-snapshot': variant.how == 'live'}
    try:
        reason = variant.trap and snapshot.traps(vm)[variant.trap]
        if reason:
            raise Unavailable(reason)
        vm.qmp.cmd('migrate-set-capabilities', capabilities=[
            {'capability': name, 'state': state}
            for name, state in wanted.items()])
        vm.qmp.cmd('migrate-set-parameters', **parameters)
        variant.format.choose(vm)
    except ExecuteError as refusal:
        raise Unavailable(refusal) from refusal


def save(vm: VM, row: Row, variant: Variant, sink) -> Result:
    """Save the RAM of @vm, which runs and then runs again."""
    mark = vm.qmp.mark()
    began = time.monotonic()
    try:
        info = {'live': _live, 'stopped': _stopped, 'savevm': _savevm}[
            variant.how](vm, row, sink)
    except (ExecuteError, SnapshotFailed) as reason:
        raise Unavailable(reason) from reason
    seconds = time.monotonic() - began
    if variant.how == 'stopped':
        vm.qmp.cmd('cont')
    return Result(seconds, snapshot.freeze(vm, mark), info)


def _live(vm: VM, row: Row, sink) -> Dict[str, Any]:
    """It stops the VM itself for the device state, and resumes it."""
    mark = snapshot.start(vm, sink)
    if row.whole:
        return snapshot.wait(vm, mark, TIMEOUT_S)
    ended = vm.qmp.wait_event(
        mark, 'RESUME or end of the migration', lambda e: e['event'] ==
        'RESUME' or e.get('data', {}).get('status') in snapshot.FINAL, 60)
    if ended['event'] == 'RESUME':
        time.sleep(CANCEL_S)
        vm.qmp.cmd('migrate_cancel')
    try:
        return snapshot.wait(vm, mark, TIMEOUT_S)
    except SnapshotFailed:
        info = vm.qmp.cmd('query-migrate')
        if info['status'] != 'cancelled':
            raise
        return info


def _stopped(vm: VM, _row: Row, sink) -> Dict[str, Any]:
    snapshot.pause(vm)
    return snapshot.wait(vm, snapshot.start(vm, sink), TIMEOUT_S)


def _savevm(vm: VM, _row: Row, _sink) -> Dict[str, Any]:
    mark = vm.qmp.mark()
    vm.qmp.cmd('snapshot-save', job_id='save', tag='bench', vmstate='disk',
               devices=['disk'])
    vm.qmp.wait_event(
        mark, 'end of snapshot-save', lambda e: e['event'] ==
        'JOB_STATUS_CHANGE' and e['data']['status'] == 'concluded', TIMEOUT_S)
    [job] = vm.qmp.cmd('query-jobs')
    if 'error' in job:
        raise SnapshotFailed(job['error'])
    return {}


def dd(image: Path, size: int, direct: bool, source: Path) -> Dict[str, Any]:
    """Have dd write @size bytes to @image, in whole blocks of 1 MiB.

    They are in @source, in memory, before.
    """
    blocks = -(-size // BLOCK)
    noise = os.urandom(BLOCK)
    with source.open('wb') as file:
        for _ in range(blocks):
            file.write(noise)
    try:
        image.unlink(missing_ok=True)
        os.sync()
        began = time.monotonic()
        subprocess.run(['dd', f'if={source}', f'of={image}', 'status=none',
                        f'bs={BLOCK}', *['oflag=direct'] * direct],
                       check=True)
        return {'seconds': time.monotonic() - began,
                'image_bytes': blocks * BLOCK, 'page_bytes': blocks * BLOCK}
    finally:
        source.unlink()
        image.unlink(missing_ok=True)
