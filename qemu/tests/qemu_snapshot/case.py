# SPDX-License-Identifier: GPL-2.0-or-later

"""
What the tests of scripts/qemu-snapshot share: bare VMs, without a guest,
whose disks and RAM are written to from outside.

QEMU         a QEMU with the series (default: in PATH)
QEMU_STOCK   the QEMU that restores (default: the same)
QEMU_IMG     qemu-img (default: in PATH)
ACCEL        the accelerator: qtest, which has no CPUs that run, or tcg
SCRIPTS      where qemu-snapshot is (default: ../../scripts)
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path


HERE = Path(__file__).resolve().parent
SCRIPTS = Path(os.environ.get('SCRIPTS', HERE.parent.parent / 'scripts'))
QEMU = os.environ.get('QEMU') or shutil.which('qemu-system-x86_64')
ACCEL = os.environ.get('ACCEL', 'qtest')
STOCK = os.environ.get('QEMU_STOCK', QEMU)
QEMU_IMG = os.environ.get('QEMU_IMG') or shutil.which('qemu-img')
RAM = 128 << 20
FILLED_AT, FILLED = 16 << 20, 64 << 20
BLOCK = 64 << 10

# A shell has its jobs in the background ignore it, and qemu-snapshot would
signal.signal(signal.SIGINT, signal.default_int_handler)

sys.path.insert(0, str(SCRIPTS.parent / 'python'))
sys.path.insert(0, str(SCRIPTS))
# pylint: disable=wrong-import-position
from snapshot import blockjobs  # noqa: E402
from snapshot.errors import Refused  # noqa: E402
from snapshot.vm import VM  # noqa: E402


class Guest:
    """A QEMU, whose disks and RAM can be looked at and written to."""

    def __init__(self, folder, *arguments, binary=QEMU, user=None):
        self.folder = folder
        self.socket = str(folder / 'vm.qmp')
        (folder / 'test.qmp').unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [binary, '-machine', 'q35', '-accel', ACCEL, '-nodefaults',
             '-display', 'none', '-m', '128M', *arguments,
             '-qtest', f'unix:{folder}/vm.qtest,server=on,wait=off',
             '-qtest-log', 'none',
             '-qmp', f'unix:{self.socket},server=on,wait=off',
             '-qmp', f'unix:{folder}/other.qmp,server=on,wait=off',
             '-qmp', f'unix:{folder}/test.qmp,server=on,wait=off'],
            cwd=folder, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, user=user)
        for tries_left in range(2400, -1, -1):
            try:
                self.vm = VM(str(folder / 'test.qmp'))
                break
            except Refused:
                if not tries_left or self.process.poll() is not None:
                    raise
                time.sleep(0.05)
        self.qtest = None

    def fill(self, byte, start=FILLED_AT, size=FILLED):
        """Write to RAM, as a device would."""
        if self.qtest is None:
            self.qtest = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.qtest.connect(str(self.folder / 'vm.qtest'))
        self.qtest.sendall(f'memset {start:#x} {size:#x} {byte:#x}\n'
                           .encode())
        self.qtest.recv(100)

    def ram(self, at=FILLED_AT):
        return ram(self.vm, at)

    def disk(self, which, command):
        return disk(self.vm, which, command)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def close(self):
        self.vm.close()
        if self.qtest is not None:
            self.qtest.close()
        self.kill()


def free_port():
    """One of TCP that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def ram(vm, at=FILLED_AT):
    """One byte of it."""
    with tempfile.NamedTemporaryFile() as file:
        vm.cmd('pmemsave', val=at, size=1, filename=file.name)
        return file.read()[0]


def disk(vm, which, action):
    """Do what write() or read() returns with the disk of a device."""
    what, byte, at = action
    device = f'/machine/peripheral/{which}/virtio-backend'

    def qemu_io(command):
        vm.cmd('human-monitor-command',
               command_line=f'qemu-io -d {device} "{command}"')
    if what == 'write':
        qemu_io(f'write -P {byte} {at} {BLOCK}')
    # What QEMU still keeps for itself is not to be seen from outside
    qemu_io('flush')
    [inserted] = [one['inserted'] for one in vm.cmd('query-block')
                  if one.get('qdev') == device]
    with tempfile.NamedTemporaryFile() as copy:
        subprocess.run([
            QEMU_IMG, 'dd', '-U', '-f', inserted['drv'], '-O', 'raw',
            f'bs={BLOCK}', f'skip={at // BLOCK}', f'count={at // BLOCK + 1}',
            'if=' + blockjobs.path_of(vm, inserted['image']['filename']),
            f'of={copy.name}'], check=True)
        found = set(copy.read())
    if found != {byte}:
        raise AssertionError(f'{which} has {found} at {at}, not {byte}')


def write(byte, at=0):
    return 'write', byte, at


def read(byte, at=0):
    return 'read', byte, at


class Case(unittest.TestCase):
    """A folder with two disks, and a guest with them."""
    arguments = (
        '-drive', 'file=one.qcow2,if=none,id=d1,format=qcow2',
        '-device', 'virtio-blk-pci,drive=d1,id=one',
        '-blockdev', '{"driver": "raw", "node-name": "d2", "file": '
        '{"driver": "file", "filename": "two.raw"}}',
        '-device', 'virtio-blk-pci,drive=d2,id=two')

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix='qemu-snapshot-'))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.snaps = self.folder / 'snaps'
        self.snaps.mkdir()
        for name, kind in (('one.qcow2', 'qcow2'), ('two.raw', 'raw')):
            self.image('create', '-q', '-f', kind, name, '64M')
        self.guest = None
        self.restored = 0

    # One that is started on the overlays of snapshot "s"
    anew = tuple(word.replace('one.qcow2', 'one.s.qcow2').replace(
        '"raw", "node', '"qcow2", "node').replace('two.raw', 'two.s.qcow2')
        for word in arguments)

    def boot(self, *arguments):
        self.guest = Guest(self.folder, *(arguments or self.arguments))
        self.addCleanup(self.guest.close)
        for which in ('one', 'two') if not arguments else ():
            self.guest.disk(which, write(1))
        self.guest.fill(1)

    def on(self, name):
        """Arguments for a VM on the overlays of a snapshot."""
        return tuple(word.replace('.s.', f'.{name}.') for word in self.anew)

    def two(self):
        """Two snapshots; the VM is off, and has written 3."""
        self.boot()
        self.create('s1')
        self.guest.disk('two', write(2))
        self.create('s2')
        self.guest.disk('two', write(3))
        self.guest.close()

    def need_user(self, user, *programs):
        """Skip unless we can have another user run programs."""
        if os.geteuid() != 0:
            self.skipTest('only root can be somebody else')
        for program in programs:
            try:
                subprocess.run([program, '--version'], user=user, check=True,
                               stdout=subprocess.DEVNULL)
            except (OSError, subprocess.CalledProcessError):
                self.skipTest(f'user {user} may not run {program}')

    def mount(self, options):
        if os.geteuid() != 0:
            self.skipTest('only root can mount')
        folder = self.folder / 'small'
        folder.mkdir()
        subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs',
                        str(folder)], check=True)
        self.addCleanup(subprocess.run, ['umount', '-l', str(folder)],
                        check=False)
        return folder

    def image(self, *arguments):
        return subprocess.run([QEMU_IMG, *arguments], cwd=self.folder,
                              check=True, stdout=subprocess.PIPE,
                              text=True).stdout

    def start(self, *words, at='', **streams):
        """@at: where it is to be stopped, as stop.py has it.

        @streams: for Popen.
        """
        program = ([str(HERE / 'stop.py'), at] if at
                   else [str(SCRIPTS / 'qemu-snapshot')])
        return subprocess.Popen(
            [sys.executable, *program, words[0],
             '--json', '--qemu-img', QEMU_IMG, *words[1:]], text=True,
            **{'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE,
               **streams})

    def stopped(self, at, *words, code=-signal.SIGKILL):
        """Run a command until it is killed (or sent a signal) at a place."""
        process = self.start(*words, at=at)
        process.communicate(timeout=60)
        self.assertEqual(process.returncode, code)

    def end(self, process, code=0):
        out, err = process.communicate(timeout=120)
        self.assertEqual(process.returncode, code, f'{out}\n{err}')
        self.assertNotIn('Traceback', err)
        return json.loads(out)

    def tool(self, *words, code=0):
        return self.end(self.start(*words), code)

    def create(self, name, *more, code=0):
        return self.tool('create', str(self.snaps / name), '--qmp',
                         self.guest.socket, *more, code=code)

    def delete(self, name, *more, online=True, code=0):
        if online:
            more = (*more, '--qmp', self.guest.socket)
        return self.tool('delete', str(self.snaps / name), *more, code=code)

    def start_restore(self, name, *more, **streams):
        """Take the qtest socket out of the command line."""
        self.restored += 1
        path = str(self.folder / f'restored{self.restored}.qmp')
        return self.start(
            'restore', str(self.snaps / name), '--qmp', path, '--binary',
            STOCK, '--replace',
            f'unix:{self.folder}/vm.qtest,server=on,wait=off', 'null', *more,
            **streams)

    def restore(self, name, *more):
        """A restored VM."""
        return self.end_restore(self.start_restore(name, *more))

    def end_restore(self, process):
        """The VM that is being restored."""
        done = self.end(process)
        vm = VM(done['result']['qmp'])
        vm.disks = done['result']['disks']

        def close():
            vm.close()
            try:
                os.kill(done['result']['pid'], signal.SIGKILL)
            except ProcessLookupError:
                pass
            for file in vm.disks:
                Path(file).unlink(missing_ok=True)
        vm.shut = close
        self.addCleanup(close)
        self.assertEqual(vm.status(), 'running')
        return vm

    def files(self):
        """What is in the folder, sockets apart."""
        return sorted(str(p.relative_to(self.folder)) for p
                      in self.folder.rglob('*') if p.is_file())

    def written_to(self):
        """The files of the guest's disks."""
        return sorted(os.path.basename(blockjobs.path_of(
            self.guest.vm, device['inserted']['file']))
            for device in self.guest.vm.cmd('query-block'))

    def settings(self):
        caps = {c['capability']: c['state'] for c in self.guest.vm.cmd(
            'query-migrate-capabilities')}
        return (caps, self.guest.vm.cmd('query-migrate-parameters'),
                self.guest.vm.cmd('qom-list', path='/objects'))

    def unchanged(self, action):
        """@action leaves files, settings and the VM as they are."""
        before = self.files(), self.written_to(), self.settings()
        action()
        self.assertEqual(self.guest.vm.status(), 'running')
        self.assertEqual(before, (self.files(), self.written_to(),
                                  self.settings()))
        for which in ('one', 'two'):
            self.guest.disk(which, read(1))
            self.guest.disk(which, write(9, BLOCK))
            self.guest.disk(which, read(9, BLOCK))
