# SPDX-License-Identifier: GPL-2.0-or-later

"""
Snapshots that succeed, in each mode, and what is restored from them.
"""

import os
import shutil
import subprocess
import sys

from case import (Case, FILLED, FILLED_AT, Guest, QEMU, QEMU_IMG, SCRIPTS,
                  disk, ram, read, write)


class RoundTrip(Case):
    """Snapshots that succeed."""

    def round_trip(self, *more):
        self.boot()
        settings = self.settings()
        done = self.create('s', *more)['result']
        self.assertEqual(settings, self.settings())
        self.assertEqual(self.guest.vm.status(), 'running')
        self.guest.fill(2)
        for which in ('one', 'two'):
            self.guest.disk(which, write(2))
        [listed] = self.tool('list', str(self.snaps))['result']['snapshots']
        self.assertEqual(listed['name'], 's')
        found = self.tool('verify', str(self.snaps / 's'))['result']
        self.assertEqual(found['problems'], [])
        # Two at a time, and one after these have written
        vms = [self.restore('s') for _ in range(2)]
        for vm in vms + [None]:
            vm = vm or self.restore('s')
            self.assertEqual([ram(vm), ram(vm, FILLED_AT + FILLED - 1)],
                             [1, 1])
            for which in ('one', 'two'):
                disk(vm, which, read(1))
                disk(vm, which, write(3))
            vm.shut()
        self.assertEqual(self.guest.ram(), 2)
        return done

    def test_stream(self):
        self.round_trip()
        self.assertEqual(self.written_to(), ['one.s.qcow2', 'two.s.qcow2'])
        self.delete('s')
        self.assertEqual(self.written_to(), ['one.qcow2', 'two.raw'])
        self.assertEqual(self.files(), ['one.qcow2', 'two.raw'])
        for which in ('one', 'two'):
            self.guest.disk(which, read(2))

    def test_mapped(self):
        self.round_trip('--format', 'mapped-ram')

    def test_mapped_channels(self):
        self.round_trip('--format', 'mapped-ram', '--channels', '3')

    def test_mapped_direct(self):
        self.round_trip('--format', 'mapped-ram', '--channels', '2',
                        '--direct-io')

    def test_text(self):
        """What people see, who do not ask for JSON."""
        self.boot()
        snap = str(self.snaps / 's')

        def said(*words):
            return subprocess.run(
                [sys.executable, str(SCRIPTS / 'qemu-snapshot'), *words,
                 '--qemu-img', QEMU_IMG], check=True, text=True,
                stdout=subprocess.PIPE).stdout
        made = said('create', snap, '--qmp', self.guest.socket)
        self.assertRegex(made, r'(?s)^s: .*two\.s\.qcow2')
        self.assertRegex(said('list', str(self.snaps)), r'(?m)^s .*stream')
        self.assertIn('s', said('verify', snap))
        shown = said('restore', snap, '--qmp', str(self.folder / 'r.qmp'),
                     '--replace', f'unix:{self.folder}/vm.qtest,server=on,'
                     'wait=off', 'null', '--print')
        self.assertRegex(shown, r'-incoming defer .*r\.qmp')
        self.assertIn('two.raw', said('delete', snap, '--qmp',
                                      self.guest.socket))
        for command in 'create', 'list', 'verify', 'restore', 'delete':
            self.assertIn('DIR', said(command, '--help'))

    def test_options(self):
        self.boot()
        folder = self.folder / 'overlays'
        folder.mkdir()
        self.create('s', '--buffer', '8M', '--trap', 'uffd-thread',
                    '--no-checksum', '--overlay-dir', str(folder))
        self.assertEqual(self.files(), [
            'one.qcow2', 'overlays/one.s.qcow2', 'overlays/two.s.qcow2',
            'snaps/s/manifest.json', 'snaps/s/ram', 'two.raw'])
        disk(self.restore('s', '--overlay-dir', str(folder)), 'two', read(1))

    def test_none(self):
        self.boot()
        self.guest.vm.cmd('stop')
        self.create('s', '--disks', 'none', code=2)
        for name in ('one.qcow2', 'two.raw'):
            shutil.copy(self.folder / name, self.folder / f'copy-{name}')
        self.create('s', '--disks', 'none', '--paused')
        self.assertEqual(self.guest.vm.status(), 'running')
        self.guest.disk('two', write(2))
        self.tool('restore', str(self.snaps / 's'), '--qmp',
                  str(self.folder / 'x.qmp'), code=2)
        vm = self.restore('s', '--disk', f'd1={self.folder}/copy-one.qcow2',
                          '--disk', f'd2={self.folder}/copy-two.raw')
        disk(vm, 'two', read(1))
        self.assertEqual(ram(vm), 1)
        self.delete('s', online=False)
        self.assertEqual(self.files(), ['copy-one.qcow2', 'copy-two.raw',
                                        'one.qcow2', 'two.raw'])

    def test_internal(self):
        self.boot()
        self.create('s', '--disks', 'internal', code=2)  # two.raw
        self.guest.close()
        self.boot(*self.arguments[:4])
        self.guest.disk('one', write(1))
        self.create('s', '--disks', 'internal')
        self.create('s2', '--disks', 'internal')
        self.guest.disk('one', write(2))
        self.assertEqual(self.tool('verify', str(self.snaps / 's'))
                         ['result']['problems'], [])
        self.delete('s2')
        self.guest.close()
        vm = self.restore('s')
        disk(vm, 'one', read(1))
        vm.shut()
        self.assertIn('s', self.image('snapshot', '-l', 'one.qcow2'))
        self.delete('s', online=False)
        self.assertEqual(self.image('snapshot', '-l', 'one.qcow2'), '')
        self.assertEqual(self.files(), ['one.qcow2', 'two.raw'])

    def test_restored_at_once(self):
        """Each gets disks of its own, which "delete" knows."""
        self.boot()
        self.create('s')
        folder = self.folder / 'overlays'
        folder.mkdir()
        starting = [self.start_restore('s', '--overlay-dir', str(folder))
                    for _ in range(4)]
        vms = [self.end_restore(process) for process in starting]
        self.assertEqual(len({disk for vm in vms for disk in vm.disks}), 8)
        for number, vm in enumerate(vms, 2):
            disk(vm, 'two', write(number))
        for number, vm in enumerate(vms, 2):
            disk(vm, 'two', read(number))
        self.guest.close()
        while vms:
            self.delete('s', online=False, code=2)
            vms.pop().shut()
        self.delete('s', online=False)

    def test_who_may_read(self):
        """What is in a disk nobody may read from an overlay either."""
        (self.folder / 'two.raw').chmod(0o600)
        self.boot()
        self.create('s')
        self.restore('s')
        for file in [*self.folder.glob('two.*'), *self.snaps.glob('s/*')]:
            self.assertEqual(file.stat().st_mode & 0o77, 0, file)

    def test_another_user(self):
        """QEMU may write the image, and nothing that we trust later."""
        self.need_user(65534, QEMU)
        for path in [self.folder, *self.folder.glob('*.*')]:
            os.chown(path, 65534, 65534)
        self.guest = Guest(self.folder, *self.arguments, user=65534)
        self.addCleanup(self.guest.close)
        self.guest.fill(1)
        self.create('s')
        self.assertEqual([(path.name, path.stat().st_uid) for path in sorted(
            [self.snaps / 's', *(self.snaps / 's').iterdir()])],
            [('s', 0), ('manifest.json', 0), ('ram', 65534)])
        vm = self.restore('s')
        self.assertEqual(ram(vm), 1)
        self.assertEqual({os.stat(path).st_uid for path in vm.disks}, {65534})
        vm.shut()
        self.delete('s')

    def test_uri(self):
        self.boot()
        image = self.folder / 'image'
        self.create('s', '--uri', f'exec:cat >{image}')
        self.tool('restore', str(self.snaps / 's'), '--qmp',
                  str(self.folder / 'x.qmp'), code=2)
        self.assertEqual(ram(self.restore('s', '--uri',
                                          f'exec:cat {image}')), 1)

    def test_refuses_sockets_in_use(self):
        self.boot()
        self.create('s')
        said = self.tool('restore', str(self.snaps / 's'), '--qmp',
                         str(self.folder / 'x.qmp'), code=2)
        self.assertIn('vm.qtest', said['error'])

    def test_failing_restore(self):
        self.boot()
        self.create('s')
        before = self.files()
        said = self.tool(
            'restore', str(self.snaps / 's'), '--qmp',
            str(self.folder / 'x.qmp'), '--replace',
            f'unix:{self.folder}/vm.qtest,server=on,wait=off', 'null',
            '--', '-m', '64M', code=1)
        self.assertIn('mismatch', said['error'].lower())
        self.assertEqual(before, self.files())
