# SPDX-License-Identifier: GPL-2.0-or-later

"""
delete --partial: undoes a "create" that was killed, from its journal.
"""

import os
from typing import Any, Dict, Optional

from . import blockjobs, store
from .errors import NotUndone, Refused, SnapshotError
from .images import QemuImg
from .progress import Progress
from .undo import Undo, runs
from .vm import VM


Json = Dict[str, Any]


def delete_partial(place: store.Snapshot, vm: Optional[VM],
                   image_tool: QemuImg, progress: Progress) -> Json:
    """Undo it, with its VM if that runs; returns its name."""
    if not os.path.isdir(place.partial):
        raise Refused(f'there is no partial snapshot {place.path}')
    place.lock(place.partial)
    try:
        journal = place.journal()
    except SnapshotError:
        # "create" writes its journal before it changes anything
        place.abandon()
        return {'name': place.name}
    _check_vm(journal, vm)
    if vm is None:
        image_tool.need('to merge the overlays of a VM that is off')
    todo = Undo(place, journal, vm, image_tool, progress).run()
    if todo:
        raise NotUndone(f'{place.path} is not quite undone', todo)
    return {'name': place.name}


def _check_vm(journal: Json, vm: Optional[VM]) -> None:
    """Refuse to take a VM for another, or one that runs to be off."""
    if vm is not None and vm.identity() == journal['vm']:
        return
    if runs(journal):
        raise Refused('the VM of the partial snapshot (process '
                      f'{journal["vm"]["pid"]}) runs: give its socket with '
                      '--qmp')
    if vm is not None and not any(
            'overlay' in disk
            and blockjobs.root_of(vm, disk['overlay']) is not None
            for disk in journal['disks']):
        raise Refused(f'the VM at {vm.address} uses no disk of the partial '
                      'snapshot; if its own VM is off, leave out --qmp')
