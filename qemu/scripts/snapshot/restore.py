# SPDX-License-Identifier: GPL-2.0-or-later

"""
restore: starts a VM from a snapshot, with the command line that the VM had.
Its disks are new overlays on those of the snapshot, which so can be restored
any number of times.
"""

import argparse
import contextlib
import os
import shlex
import socket
import subprocess
import tempfile
import time
from typing import Any, Dict, List, Optional

from . import migration, records, store
from .cmdline import CommandLine
from .errors import Interrupted, Refused, SnapshotError
from .images import QemuImg, ours
from .progress import Progress
from .signals import Signals
from .vm import VM


Json = Dict[str, Any]

START_S = 60


def listening(path: str) -> bool:
    """Whether somebody answers at a socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
            return True
        except socket.timeout:
            return True
        except OSError:
            return False


class Restore:
    """One restored VM."""

    def __init__(self, options: argparse.Namespace, progress: Progress):
        self.options = options
        self.progress = progress
        self.place = store.Snapshot(options.snapshot)
        self.manifest = self._read()
        self.signals = Signals()
        image = self.manifest['image']
        self.format = migration.Format(
            image['mapped'], image['channels'], image['direct'])
        self.uri = options.uri or self._uri()
        self.binary = (options.binary
                       or self.manifest['command'].get('binary'))
        self.image_tool = QemuImg(options.qemu_img, self.binary)
        if not options.command and not options.binary and self.binary and \
                os.path.exists(self.binary) and \
                not ours(os.path.realpath(self.binary)):
            raise Refused(f'{self.binary} can be changed by others: name a '
                          'QEMU with --binary')
        # Not taken for a host and a port
        options.qmp = os.path.abspath(options.qmp)
        self.made: List[str] = []
        self._files: Dict[str, int] = {}

    def _read(self) -> Json:
        manifest = self.place.read()
        if not self.options.command:
            # It has the command line that would be run
            self.place.check_owner(
                self.place.path, 'give a whole command line with --command, '
                'or copy the snapshot as yourself to another directory')
        return manifest

    def _uri(self) -> str:
        image = self.manifest['image']
        if 'file' in image:
            return 'file:' + os.path.join(self.place.path, image['file'])
        if image['uri'].startswith('file:'):
            return str(image['uri'])
        raise Refused(f'the image went to {image["uri"]}: --uri must tell '
                      'where it can be read from')

    def run(self) -> Json:
        """Returns what there is to know of the new VM."""
        given = dict(self._given(text) for text in self.options.disk)
        command, cwd = self._command()
        line = CommandLine(command, cwd)
        dropped = line.drop()
        line.check({new for _, new in self.options.replace})
        for path in line.sockets():
            if listening(path):
                raise Refused(f'somebody listens at {path}, from whom the '
                              'restored VM would take it: --replace gives it '
                              'another one')
        if listening(self.options.qmp):
            raise Refused(f'somebody listens at {self.options.qmp}')
        try:
            with self.place.guard():
                # Deleting the one below may just have changed it
                self.manifest = self._read()
                self._put_disks(line, given)
                self._record()
        except BaseException:
            self._clean()
            raise
        argv = self._finish(line)
        if self.options.print:
            return {'argv': argv, 'cwd': cwd, 'dropped': dropped,
                    'uri': self.uri, 'shell': shlex.join(argv)}
        if dropped:
            self.progress.step('not used again: ' + shlex.join(dropped))
        return self._start(argv, cwd)

    @staticmethod
    def _given(text: str) -> List[str]:
        if '=' not in text:
            raise Refused(f'--disk {text}: ID=FILE is needed')
        return text.split('=', 1)

    def _command(self) -> Any:
        saved = self.manifest['command']
        extra = list(self.options.arguments)
        if self.options.command:
            if not extra:
                raise Refused('--command needs a command line after --')
            return extra, os.getcwd()
        if not saved:
            raise Refused('the snapshot has no command line: give the whole '
                          'of it with --command -- COMMAND...')
        if not os.path.isdir(saved['cwd']):
            raise Refused(f'{saved["cwd"]}, where the VM was started, is no '
                          'directory')
        argv = [self.binary, *saved['argv'][1:]]
        for old, new in self.options.replace:
            if old not in argv:
                raise Refused(f'--replace: no argument is {old!r}')
            argv = [new if word == old else word for word in argv]
        return argv + extra, saved['cwd']

    # Disks

    def _put_disks(self, line: CommandLine, given: Dict[str, str]) -> None:
        mode = self.manifest['disks']['mode']
        entries = self.manifest['disks']['list']
        unknown = set(given) - {disk['id'] for disk in entries}
        if unknown:
            raise Refused(f'there is no disk {", ".join(unknown)}; there are: '
                          + ', '.join(disk['id'] for disk in entries))
        missing = [disk['id'] for disk in entries if disk['id'] not in given]
        if mode == 'none' and missing:
            raise Refused('the snapshot has no disks: --disk ID=FILE must '
                          'tell what they were at that time, for '
                          + ', '.join(missing))
        if missing or given:
            self.image_tool.need('for the disks')
        taken = [(disk, line.place_of(disk['chain'])) for disk in entries]
        plan = []
        for number, (disk, put) in enumerate(taken):
            if disk['id'] in given:
                path = os.path.abspath(given[disk['id']])
                put(path, self.image_tool.info(path)['format'])
                continue
            self._check_disk(disk)
            path = self._new_name(disk, number)
            put(path, 'qcow2')
            plan.append((disk, path))
        if self.options.print:
            return
        for disk, path in plan:
            self.progress.step(f'create {path}')
            # Its directory's owner may have put something else there
            fd = self._files[path]
            store.like(fd, disk['file'], owner=True)
            if mode == 'internal':
                self.image_tool.copy_internal(
                    disk['file'], self.manifest['name'], fd)
            else:
                self.image_tool.create(fd, disk['file'], disk['format'])
            os.close(self._files.pop(path))
            self.signals.check()

    def _check_disk(self, disk: Json) -> None:
        if not os.path.exists(disk['file']):
            raise Refused(f'disk {disk["id"]}: there is no {disk["file"]}')
        if self.manifest['disks']['mode'] != 'external':
            return
        if not store.fits(disk):
            raise Refused(f'disk {disk["id"]}: {disk["file"]} was written to '
                          'after the snapshot')

    def _new_name(self, disk: Json, number: int) -> str:
        """A file of that name is there then, and ours."""
        folder = self.options.overlay_dir or os.path.dirname(disk['file'])
        if store.in_dev(folder):
            raise Refused(f'disk {disk["id"]} is a device: --overlay-dir must '
                          'tell where its overlay goes')
        stem = os.path.splitext(os.path.basename(disk['chain'][-1]))[0]
        if number and self.options.overlay_dir:
            stem += f'-{number}'
        count = 1
        while True:
            path = os.path.join(
                os.path.abspath(folder), f'{stem}.{self.manifest["name"]}'
                f'-restored{count}.qcow2')
            try:
                if not self.options.print:
                    self._files[path] = os.open(
                        path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
                    self.made.append(path)
                elif os.path.lexists(path):
                    raise FileExistsError
                return path
            except FileExistsError:
                count += 1

    def _record(self) -> None:
        """Have "delete" know of the overlays, wherever they are."""
        records.add(os.path.join(self.place.path, records.RESTORED),
                    [path for path in self.made if os.path.exists(path)])

    def _clean(self) -> None:
        for path in self.made:
            if os.path.exists(path):
                os.unlink(path)
        if self.made:
            with contextlib.suppress(SnapshotError, OSError), \
                    self.place.guard():
                self._record()

    # QEMU

    def _finish(self, line: CommandLine) -> List[str]:
        machine = self.manifest['qemu'].get('machine')
        argv = list(line.argv)
        if machine:
            # An alias such as "q35" is another machine in another release
            argv += ['-machine', f'type={machine}']
        if self.options.paused:
            argv.append('-S')
        socket_path = self.options.qmp.replace(',', ',,')
        return argv + ['-incoming', 'defer', '-qmp',
                       f'unix:{socket_path},server=on,wait=off']

    def _start(self, argv: List[str], cwd: str) -> Json:
        if self.options.foreground:
            return self._drive(argv, cwd, None)
        if self.options.log:
            try:
                # pylint: disable=consider-using-with
                log = open(self.options.log, 'a+b')
            except OSError:
                self._clean()
                raise
            with log:
                return self._drive(argv, cwd, log)
        with tempfile.TemporaryFile() as log:
            return self._drive(argv, cwd, log)

    def _drive(self, argv: List[str], cwd: str, log: Any) -> Json:
        self.progress.step(f'start {shlex.join(argv)}')
        began = log.seek(0, os.SEEK_END) if log else 0
        try:
            # pylint: disable=consider-using-with
            process = subprocess.Popen(
                argv, cwd=cwd, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL if log else None,
                start_new_session=log is not None)
        except OSError as problem:
            self._clean()
            raise SnapshotError(f'cannot start {argv[0]}: {problem}'
                                ) from problem
        vm: Optional[VM] = None
        try:
            vm = self._connect(process)
            self._load(vm)
            status = self._wait_started(vm)
        except BaseException as problem:
            process.kill()
            process.wait()
            self._clean()
            if os.path.exists(self.options.qmp):
                os.unlink(self.options.qmp)
            if not isinstance(problem, SnapshotError) or log is None:
                raise
            log.seek(began)
            words = log.read().decode(errors='replace').strip()
            if isinstance(problem, Interrupted):
                raise
            raise SnapshotError(f'{problem}' + (
                f'; QEMU says: {words}' if words else '')) from problem
        finally:
            self.progress.end()
            if vm is not None:
                vm.close()
        result = {'pid': process.pid, 'qmp': self.options.qmp,
                  'status': status, 'disks': self.made, 'argv': argv}
        if self.options.foreground:
            result['exit-status'] = process.wait()
        return result

    def _connect(self, process: 'subprocess.Popen[bytes]') -> VM:
        deadline = time.monotonic() + START_S
        while process.poll() is None:
            self.signals.check()
            try:
                return VM(self.options.qmp)
            except Refused:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        raise SnapshotError(f'QEMU has ended with {process.returncode}')

    def _load(self, vm: VM) -> None:
        migration.apply(vm, {'capabilities': self.format.capabilities(),
                             'parameters': self.format.parameters()})
        self.progress.step(f'load {self.uri}')
        # Otherwise QEMU ends without a word that reaches us
        vm.cmd('migrate-incoming', uri=self.uri, exit_on_error=False)
        migration.wait(vm, lambda info: self.signals.check())

    def _wait_started(self, vm: VM) -> str:
        """The state in which the VM goes on; raise if that is not as asked."""
        deadline = time.monotonic() + START_S
        status = vm.status()
        while status == 'inmigrate' and time.monotonic() < deadline:
            self.signals.check()
            time.sleep(0.01)
            status = vm.status()
        if not self.options.paused and status != 'running' and \
                self.manifest['vm'].get('running'):
            raise SnapshotError(f'the VM does not run, it is {status}: QEMU '
                                'may have been refused a disk')
        return status
