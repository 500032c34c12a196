# SPDX-License-Identifier: GPL-2.0-or-later

"""
delete --partial: undoes a "create" that was killed, from its journal.
"""

import argparse
import os
from typing import Any, Dict, Optional

from . import blockjobs, store
from .errors import NotUndone, Refused, SnapshotError
from .images import QemuImg
from .progress import Progress
from .undo import Undo
from .vm import VM, may_run


Json = Dict[str, Any]


def delete_partial(place: store.Snapshot, vm: Optional[VM],
                   image_tool: QemuImg, options: argparse.Namespace,
                   progress: Progress) -> Json:
    """Undo it, with its VM if that runs; returns its name."""
    if not os.path.isdir(place.partial):
        raise Refused(f'there is no partial snapshot {place.path}')
    try:
        place.lock(place.partial)
    except OSError as problem:
        raise Refused(str(problem)) from problem
    journal = place.journal()
    if journal is None:
        # "create" writes its journal before it changes anything
        place.abandon()
        return {'name': place.name}
    try:
        _check_vm(journal, vm, options.vm_off)
    except SnapshotError as problem:
        raise Refused(str(problem)) from problem
    if vm is None and not options.forget and journal['disks']:
        image_tool.need('to merge the overlays of a VM that is off')
    todo = Undo(place, journal, vm, image_tool, progress,
                options.forget).run()
    if todo:
        raise NotUndone(f'{place.path} is not quite undone', todo)
    return {'name': place.name}


def _check_vm(journal: Json, vm: Optional[VM], is_off: bool) -> None:
    """Refuse to take a VM for another, or one that runs to be off."""
    if not journal.get('marked'):
        return  # Nothing was changed
    if vm is None:
        why = None if is_off else may_run(journal['vm'])
        if why is not None:
            raise Refused(f'the VM of the partial snapshot may run ({why}): '
                          'give its socket with --qmp, or, if it has ended, '
                          '--vm-off')
    # If it uses the disks, it was started anew, and the other one has ended
    elif not vm.has_mark(journal['mark']) and not any(
            blockjobs.root_of(vm, path) is not None
            for disk in journal['disks']
            for path in (disk['file'], disk.get('overlay', disk['file']))):
        raise Refused(f'the VM at {vm.address} is not that of the partial '
                      'snapshot, and uses none of its disks: give the socket '
                      'of that, or, if it has ended, --vm-off instead')
