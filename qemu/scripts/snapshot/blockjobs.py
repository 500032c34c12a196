# SPDX-License-Identifier: GPL-2.0-or-later

"""
Jobs of QEMU's block layer, waited for until they have ended, and what is done
with them: creating an image, and merging one into its base.
"""

import contextlib
import itertools
import json
import os
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

from . import store
from .errors import SnapshotError
from .vm import CommandFailed, VM


Json = Dict[str, Any]

PROTOCOLS = ('file', 'host_device')
_numbers = itertools.count()


def unique(what: str) -> str:
    """A name for a node or a job, short enough for both."""
    stamp = time.time_ns() // 1000 % 10 ** 12
    return f'snap-{what}-{stamp}-{next(_numbers)}'


def nothing() -> None:
    """For who does not want to be asked while a job runs."""


def _run(vm: VM, job: str, meanwhile: Callable[[], None],
         completing: Callable[[], None],
         finalizing: Callable[[], None] = nothing) -> None:
    """Wait until a job has ended; raise its error."""
    told = False
    try:
        delay = 0.005
        while True:
            states = [j for j in vm.cmd('query-jobs') if j['id'] == job]
            if not states:
                raise SnapshotError(f'somebody has dismissed the job {job}')
            state = states[0]
            if state['status'] == 'ready' and not told:
                completing()
                vm.cmd('job-complete', id=job)
                told = True
            elif state['status'] == 'pending' and not told:
                finalizing()
                vm.cmd('job-finalize', id=job)
                told = True
            elif state['status'] == 'concluded':
                break
            if not told:
                meanwhile()
            time.sleep(delay)
            delay = min(0.2, delay * 1.5)
    except BaseException:
        if not told:
            _cancel(vm, job)
        raise
    vm.cmd('job-dismiss', id=job)
    if 'error' in state:
        raise SnapshotError(state['error'])


def _cancel(vm: VM, job: str) -> None:
    """End a job that is not wanted any more."""
    try:
        try:
            # Not job-cancel, which lets a job that is ready complete
            vm.cmd('block-job-cancel', device=job, force=True)
        except CommandFailed:
            pass
        for _ in range(600):
            states = [j['status'] for j in vm.cmd('query-jobs')
                      if j['id'] == job]
            if states == ['concluded']:
                vm.cmd('job-dismiss', id=job)
            if states in ([], ['concluded']):
                return
            time.sleep(0.1)
    except SnapshotError:
        pass  # What was wrong in the first place is what to report


def tidy(vm: VM) -> None:
    """End the jobs of a program that was killed; raise if one stays.

    Only then does what the VM uses tell whether an overlay is merged.  The
    node of an overlay that was being created goes as well.
    """
    for tries_left in 1, 0:
        left = [job['id'] for job in vm.cmd('query-jobs')
                if job['id'].startswith(('snap-commit-', 'snap-create-'))]
        if left and not tries_left:
            raise SnapshotError(f'the job {left[0]} does not end')
        for job in left:
            _cancel(vm, job)
    for node in vm.cmd('query-named-block-nodes', flat=True):
        if node['node-name'].startswith('snap-new-'):
            _drop(vm, node['node-name'])


def _drop(vm: VM, node: str) -> None:
    """Have QEMU forget a node, unless it is in use or not ours to drop."""
    try:
        vm.cmd('blockdev-del', node_name=node)
    except CommandFailed:
        pass


def create(vm: VM, options: Json) -> None:
    """Create an image."""
    job = unique('create')
    vm.cmd('blockdev-create', job_id=job, options=options)
    _run(vm, job, nothing, nothing)


def create_file(vm: VM, path: str) -> None:
    """Create an empty file, or empty the one that is there."""
    create(vm, {'driver': 'file', 'filename': path, 'size': 0})


def create_overlay(vm: VM, path: str, size: int, base: str,
                   base_format: str) -> None:
    """Make an empty file an overlay without opening its base, in use.

    Not by blockdev-snapshot-sync, for which the VM would have to wait, and
    which leaves the base's name as the user wrote it, relative to wherever.
    """
    node = unique('new')
    vm.cmd('blockdev-add', driver='file', node_name=node, filename=path)
    try:
        create(vm, {'driver': 'qcow2', 'file': node, 'size': size,
                    'backing-file': base, 'backing-fmt': base_format})
    finally:
        vm.cmd('blockdev-del', node_name=node)


def tree_of(filename: str) -> Json:
    """What QEMU says an image is: more than a name if that is not all."""
    tree: Json = (json.loads(filename[5:]) if filename.startswith('json:')
                  else {'filename': filename})
    return tree


def path_of(vm: VM, filename: str) -> str:
    """The file of an image, from what QEMU says.

    That is more than a name if the image's base has another name than its
    header has, and relative if that is what the user has given.
    """
    tree: Any = tree_of(filename)
    while isinstance(tree, dict) and 'filename' not in tree:
        tree = tree.get('file', tree.get('file.filename'))
    name = tree['filename'] if isinstance(tree, dict) else tree
    return os.path.join(vm.cwd or '', str(name))


def same_file(one: str, other: str) -> bool:
    """Whether two names are of one file."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return one == other


def _is(vm: VM, name: str, path: str) -> bool:
    """Whether a name that path_of() has returned is of a file."""
    if os.path.isabs(name):
        return same_file(name, path)
    if os.path.basename(name) == os.path.basename(path):
        raise SnapshotError(f'the VM at {vm.address} uses {name}, and nobody '
                            f'tells whether that is {path}: give a unix '
                            'socket, and see its process in /proc')
    return False


def node_of(vm: VM, path: str) -> Optional[str]:
    """The node of the VM's block graph that has the format of an image."""
    for node in vm.cmd('query-named-block-nodes', flat=True):
        if node['drv'] not in PROTOCOLS and _is(
                vm, path_of(vm, node['file']), path):
            return str(node['node-name'])
    return None


def chain(vm: VM, image: Json) -> List[str]:
    """File names of an image and of what is below it, from the top."""
    names: List[str] = []
    link: Optional[Json] = image
    while link:
        names.append(path_of(vm, link['filename']))
        link = link.get('backing-image')
    return names


def root_of(vm: VM, path: str) -> Optional[str]:
    """The node at the top of the disk that an image is part of."""
    for device in vm.cmd('query-block'):
        inserted = device.get('inserted')
        if inserted and any(_is(vm, name, path)
                            for name in chain(vm, inserted['image'])):
            return str(inserted['node-name'])
    return None


def merge(vm: VM, overlay: str, base: str,
          completing: Callable[[], None],
          meanwhile: Callable[[], None] = nothing) -> None:
    """Write an overlay into its base and take it out of the VM's chain.

    If it is the one that the VM writes to, the VM writes to the base
    afterwards: @completing is called just before.  @meanwhile may raise until
    then.  The overlay's file is left alone.
    """
    top, bottom, root = nodes(vm, overlay, base)
    job = unique('commit')
    arguments: Json = {} if top == root else {
        # What is above it gets a name that holds from any directory
        'backing_file': os.path.abspath(base), 'auto_finalize': False}

    def flush() -> None:
        # Or the header above says that the base has all before it does.  What
        # is written here need not be there, where QEMU waits for it
        with contextlib.suppress(OSError):
            store.sync(base)
        said = vm.cmd('human-monitor-command',
                      command_line=f'qemu-io {bottom} "flush"')
        if said.strip():
            raise SnapshotError(f'{base} cannot be flushed: {said.strip()}')
        meanwhile()
    vm.cmd('block-commit', job_id=job, device=root, top_node=top,
           base_node=bottom, auto_dismiss=False, **arguments)
    _run(vm, job, meanwhile, completing, flush)
    forget(vm, overlay)


def nodes(vm: VM, overlay: str, base: str) -> Tuple[str, str, str]:
    """The nodes of both, and of what is on top; raise if there are not all."""
    top, bottom = node_of(vm, overlay), node_of(vm, base)
    root = root_of(vm, overlay)
    if top is None or bottom is None or root is None:
        raise SnapshotError(f'the VM does not use {overlay} on {base}')
    return top, bottom, root


def forget(vm: VM, overlay: str) -> None:
    """Have QEMU close an overlay that it uses for no disk any more.

    A node that came from the command line stays until it is told to go.
    """
    for node in vm.cmd('query-named-block-nodes', flat=True):
        if _is(vm, path_of(vm, node['file']), overlay):
            _drop(vm, node['node-name'])
