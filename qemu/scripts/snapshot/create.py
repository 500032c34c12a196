# SPDX-License-Identifier: GPL-2.0-or-later

"""
create: the workflow of a background snapshot.  First everything that can be
checked is checked.  Then each step is written into a journal before it is
made; the last step, one rename, turns the journal's directory into a
snapshot.
"""

import argparse
import contextlib
import os
import shutil
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

from . import blockjobs, cmdline, disks, migration, records, store
from .errors import Interrupted, NotUndone, Refused, SnapshotError
from .images import QemuImg, base_of
from .progress import Progress, report, size
from .signals import Signals
from .undo import Undo
from .vm import CommandFailed, VM, new_mark


Json = Dict[str, Any]

# Headers, devices and bitmaps: what an image takes besides RAM
OVERHEAD = 64 << 20


class Create:
    """One snapshot, from the first check to the last rename."""

    def __init__(self, options: argparse.Namespace, progress: Progress):
        self.options = options
        self.progress = progress
        self.place = store.Snapshot(options.snapshot)
        # direct-io is for the threads of multifd only
        self.format = migration.Format(
            options.format == 'mapped-ram',
            options.channels or int(options.direct_io), options.direct_io)
        self.vm = VM(options.qmp)
        self.process = self.vm.process()
        self.image_tool = QemuImg(options.qemu_img,
                                  self.process.get('binary'))
        self.uri = options.uri or 'file:' + os.path.join(
            self.place.partial, store.IMAGE)
        self.disks: List[Json] = []
        self.was_running = True
        self.pauses = True

    def run(self) -> Json:
        """Returns the manifest."""
        try:
            try:
                self._check()
                manifest = self._describe()
                journal, settings = self._plan()
            except (SnapshotError, OSError) as problem:
                raise Refused(str(problem)) from problem
            return self._make(journal, settings, manifest)
        finally:
            self.progress.end()
            self.vm.close()

    # Before anything is changed

    def _check(self) -> None:
        self._check_place()
        self.vm.claim()
        self._check_state()
        self._check_traps()
        self._check_space()
        disks.check_idle(self.vm)
        self.disks = disks.writable(self.vm)
        mode = self.options.disks
        if mode == 'none':
            if self.disks and self.was_running:
                self.progress.warn('the VM runs, and its disks are not part '
                                   'of the snapshot: they will not fit it')
            return
        disks.check(self.disks, mode)
        if mode == 'external':
            disks.place_overlays(self.disks, self.place.name,
                                 self.options.overlay_dir)
        for disk in self.disks:
            if mode == 'internal' and self.place.name in disk['snapshots']:
                raise Refused(f'disk {disk["id"]} has an internal snapshot '
                              f'{self.place.name} already')

    def _check_place(self) -> None:
        place = self.place
        if not os.path.isdir(place.directory):
            raise Refused(f'{place.directory} is no directory')
        if os.path.lexists(place.path):
            raise Refused(f'{place.path} exists already')
        if os.path.lexists(place.partial):
            raise Refused(place.unfinished())
        if os.path.lexists(place.deleting):
            raise Refused(f'{place.path} is half deleted: "delete" it again')
        if not os.access(place.directory, os.W_OK):
            raise Refused(f'cannot write to {place.directory}')
        if ',' in self.place.partial and not self.options.uri:
            raise Refused('QEMU takes what follows a comma in '
                          f'{place.directory} for an option')

    def _check_state(self) -> None:
        status = self.vm.status()
        if status == 'paused' and not self.options.paused:
            raise Refused('the VM is paused, and a background snapshot would '
                          'resume it: --paused says that it may')
        if status not in ('running', 'paused'):
            raise Refused(f'the VM is {status}; only one that is running or '
                          'paused can be snapshotted')
        self.was_running = status == 'running'
        if migration.running(self.vm):
            raise Refused('a migration is running')

    def _check_traps(self) -> None:
        try:
            traps = self.vm.cmd('query-snapshot-write-traps')
        except CommandFailed as problem:
            if problem.unknown:
                raise Refused('this QEMU has no query-snapshot-write-traps: '
                              'its background snapshots are not those that '
                              'this program is for') from None
            raise
        wanted = self.options.trap
        usable = [trap['trap'] for trap in traps if trap['available']]
        if usable and wanted in (None, 'auto', *usable):
            return
        reasons = [f'{trap["trap"]}: {trap.get("reason", "not available")}'
                   for trap in traps if not trap['available']
                   and wanted in (None, 'auto', trap['trap'])]
        raise Refused('the VM cannot be snapshotted now: ' + '; '.join(
            reasons or [f'{wanted}: not known']))

    def _check_space(self) -> None:
        if self.options.uri or self.options.ignore_space:
            return
        memory = self.vm.cmd('query-memory-size-summary')
        ram = memory['base-memory'] + memory.get('plugged-memory', 0)
        # What the VM has never touched takes no room in an image
        need = min(ram, self.vm.resident() or ram) + OVERHEAD
        free = shutil.disk_usage(self.place.directory).free
        if free < need:
            raise Refused(f'the image may take {size(need)}, and '
                          f'{self.place.directory} has {size(free)} free '
                          '(--ignore-space tries nevertheless)')

    def _plan(self) -> Tuple[Json, Json]:
        """What to know for undoing it, and settings of the migration."""
        options = self.options
        # QEMU has the VM stand still until its disks are snapshotted
        self.pauses = bool(self.disks and options.disks != 'none')
        capabilities = dict(self.format.capabilities(),
                            **{'background-snapshot': True,
                               'pause-before-switchover': self.pauses})
        parameters = self.format.parameters()
        for name, value in (('snapshot-buffer-size', options.buffer),
                            ('max-bandwidth', options.max_bandwidth),
                            ('snapshot-stall-limit', options.stall_limit),
                            ('snapshot-write-trap', options.trap)):
            if value is not None:
                parameters[name] = value
        journal = {
            'version': store.VERSION, 'vm': self.vm.run(),
            'mark': new_mark(),
            'was-running': self.was_running,
            'mode': options.disks,
            'disks': self.disks if options.disks != 'none' else [],
            'settings': migration.settings(self.vm, capabilities, parameters),
        }
        return journal, {'capabilities': capabilities,
                         'parameters': parameters}

    # The snapshot

    def _make(self, journal: Json, settings: Json, manifest: Json) -> Json:
        signals = Signals()
        self.place.begin(journal, self.vm.owner())
        try:
            self.vm.mark(journal['mark'])
            journal['marked'] = True
            self.place.note(journal)
            migration.apply(self.vm, settings)
            self._snapshot(journal, manifest, signals)
            migration.apply(self.vm, journal['settings'])
            self._finish(manifest, signals)
            with contextlib.suppress(SnapshotError):
                self.vm.unmark(journal['mark'])
        # Whatever happens, a bug of ours included, is undone
        except BaseException as problem:
            self.progress.end()
            self.progress.step(f'failed: {problem}')
            raise self._undone(problem, Undo(
                self.place, journal, self.vm, self.image_tool,
                self.progress).run()) from problem
        return manifest

    def _undone(self, problem: BaseException,
                todo: List[str]) -> BaseException:
        if todo:
            return NotUndone(str(problem), todo)
        text = str(problem)
        if not self.was_running and self._runs():
            text += ' (the VM, which was paused, had been resumed by then)'
        if isinstance(problem, Interrupted):
            return Interrupted(text)
        if isinstance(problem, (SnapshotError, OSError)):
            # A command that QEMU refuses, and so on: it is no refusal by now
            return SnapshotError(text)
        return problem

    def _runs(self) -> bool:
        try:
            return self.vm.status() == 'running'
        except SnapshotError:
            return False

    def _snapshot(self, journal: Json, manifest: Json,
                  signals: Signals) -> None:
        if self.options.disks == 'external':
            for disk in self.disks:
                self.progress.step(f'create overlay {disk["overlay"]}')
                self._record(disk)
                disks.prepare(self.vm, disk,
                              lambda: self.place.note(journal))
                store.sync(os.path.dirname(disk['overlay']))
                signals.check()
        self.vm.wait_event(0.001)
        self.vm.events.clear()
        if (self.vm.status() == 'running') != self.was_running:
            raise SnapshotError('somebody has paused or continued the VM')
        journal.update(paused=self.pauses and self.was_running,
                       snapshotting=True, migrating=True)
        self.place.note(journal)
        meanwhile = self._meanwhile(journal, signals)
        if self.pauses:
            self._sync_disks()
        self.progress.step(f'migrate to {self.uri}')
        self.progress.restart()
        try:
            self.vm.cmd('migrate', uri=self.uri)
        except CommandFailed:
            # If there is a migration, it is somebody else's
            journal['migrating'] = False
            self.place.note(journal)
            raise
        if self.pauses:
            migration.wait(self.vm, meanwhile, 'pre-switchover')
            # The VM stands still: nothing slow in between
            self.progress.step(f'snapshot {len(self.disks)} disks')
            disks.snapshot(self.vm, self.disks, self.options.disks,
                           self.place.name)
            self.vm.cmd('migrate-continue', state='pre-switchover')
        for disk in journal['disks']:
            disk['state'] = store.file_state(disk['file'])
        self.place.note(journal)

        info = migration.wait(self.vm, meanwhile)
        manifest['result'] = dict(
            report(info),
            **{'pause-seconds': migration.pause_seconds(self.vm.events)})

    def _record(self, disk: Json) -> None:
        """Have "delete" know of an overlay that is where it does not look.

        What it is on may be of a snapshot in another directory.
        """
        path, overlay = disk['file'], disk['overlay']
        folder = os.path.dirname(path)
        if base_of(path) is None or store.in_dev(folder) or \
                os.path.samefile(folder, os.path.dirname(overlay)) or \
                any(blockjobs.same_file(layer['overlay'], path)
                    for _, content in store.neighbours(self.place, True)
                    for layer in store.overlays(content)):
            return
        try:
            records.add(records.beside(path), [overlay])
        except (OSError, SnapshotError) as problem:
            self.progress.warn(f'{overlay} cannot be recorded beside {path}, '
                               f'which needs to stay: {problem}')

    def _sync_disks(self) -> None:
        """What is flushed now need not be while the VM stands still."""
        for disk in self.disks:
            try:
                store.sync(disk['file'])
            except OSError:
                pass  # QEMU does it anyway

    def _meanwhile(self, journal: Json,
                   signals: Signals) -> Callable[[Json], None]:
        deadline: Optional[float] = None
        if self.options.timeout:
            deadline = time.monotonic() + self.options.timeout

        def look(info: Json) -> None:
            if journal['paused'] and any(
                    event['event'] == 'RESUME' for event in self.vm.events):
                journal['paused'] = False
                self.place.note(journal)
            self.progress.migration(info)
            signals.check()
            if deadline is not None and time.monotonic() > deadline:
                raise SnapshotError('the image is not whole after '
                                    f'{self.options.timeout} seconds')
        return look

    def _finish(self, manifest: Json, signals: Signals) -> None:
        """The VM runs; only the image is looked at any more."""
        if not self.options.uri:
            path = os.path.join(self.place.partial, store.IMAGE)
            self.progress.step('sync the image')
            store.sync(path)
            total = os.path.getsize(path)
            manifest['image']['size'] = total
            if self.options.checksum:
                self.progress.step('checksum of the image')

                def on_chunk(done: int) -> None:
                    self.progress.bar(done / total, 'checksum')
                    signals.check()
                manifest['image']['sha256'] = store.sha256(path, on_chunk)
        for disk in manifest['disks']['list']:
            disk.update(store.file_state(disk['file'])
                        if self.options.disks == 'external' else {})
        manifest['disks']['place'] = self.place.identity()
        signals.check()
        self.place.commit(manifest)

    def _describe(self) -> Json:
        machine = self.vm.cmd('qom-get', path='/machine', property='type')
        version = self.vm.cmd('query-version')
        kept = ('id', 'file', 'format', 'virtual-size', 'chain', 'overlay')
        manifest: Json = {
            'format': store.FORMAT, 'version': store.VERSION,
            'name': self.place.name,
            'created': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
            'vm': {'name': self.vm.cmd('query-name').get('name', ''),
                   'uuid': self.vm.cmd('query-uuid')['UUID'],
                   'running': self.was_running},
            'qemu': {'version': '.'.join(str(version['qemu'][part]) for part
                                         in ('major', 'minor', 'micro')),
                     'package': version['package'],
                     'target': self.vm.cmd('query-target')['arch'],
                     'machine': machine.rpartition('-machine')[0]},
            'command': self.process,
            'image': dict(self.format._asdict(), **(
                {'uri': self.options.uri} if self.options.uri
                else {'file': store.IMAGE})),
            'disks': {'mode': self.options.disks,
                      'list': [{key: disk[key] for key in kept if key in disk}
                               for disk in self.disks]},
        }
        # Better said now than when the VM is needed again
        for problem in cmdline.problems(manifest):
            self.progress.warn(f'"restore" will need help: {problem}')
        return manifest
