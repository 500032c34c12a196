# SPDX-License-Identifier: GPL-2.0-or-later

"""
Overlays whose places somebody else takes, or that somebody else changes.
"""

import os
import re
import signal

from case import Case, Guest, QEMU, read
from snapshot.images import base_of


class Appeared(Case):
    """Files of others where overlays are to be."""

    def meanwhile(self, where, action, code, number=signal.SIGCONT):
        """Do something to "create" while it is at a place."""
        process = self.start('create', str(self.snaps / 's'), '--qmp',
                             self.guest.socket, at=f'{where} stop')
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        action()
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        self.end(process, code)
        self.assertEqual(self.guest.vm.status(), 'running')
        self.assertEqual(self.written_to(), ['one.qcow2', 'two.raw'])
        for which in 'one', 'two':
            self.guest.disk(which, read(1))

    def format(self, name='one.s.qcow2'):
        """As another VM's "create" does, for that VM's disk."""
        self.image('create', '-q', '-f', 'qcow2', '-b',
                   str(self.folder / 'two.raw'), '-F', 'raw', name)

    def stays(self, name='one.s.qcow2'):
        self.assertEqual(base_of(str(self.folder / name)),
                         str(self.folder / 'two.raw'))
        self.assertEqual(self.files(), [
            'one.qcow2', name, 'two.raw'])

    def test_overlay(self):
        self.boot()
        self.meanwhile('disks.prepare 1 before', self.format, 1)
        self.stays()

    def test_empty(self):
        """It is not taken for one that was just created here."""
        self.boot()
        for number, code in (signal.SIGCONT, 1), (signal.SIGTERM, 130):
            self.meanwhile('disks.prepare 1 after',
                           (self.folder / 'two.s.qcow2').touch, code, number)
            self.assertEqual(self.files(), ['one.qcow2', 'two.raw',
                                            'two.s.qcow2'])
            (self.folder / 'two.s.qcow2').unlink()

    def test_exchanged(self):
        """It is another file when the VM is to write to it."""
        def exchange():
            self.format('new')
            (self.folder / 'new').rename(self.folder / 'one.s.qcow2')
        self.boot()
        self.meanwhile('disks.snapshot 1 before', exchange, 1)
        self.stays()

    def test_changed(self):
        """What is in it now may be of use: it is left to the user."""
        self.boot()
        self.meanwhile('disks.snapshot 1 before', self.format, 3)
        self.assertEqual(base_of(str(self.folder / 'one.s.qcow2')),
                         str(self.folder / 'two.raw'))
        self.delete('s', '--partial', '--forget')
        self.stays()

    def test_killed(self):
        """There is a file, and nothing in it."""
        for where in ('blockjobs.create_file 1 before',
                      'blockjobs.create_file 2 after'):
            self.boot()
            self.stopped(f'{where} kill', 'create', str(self.snaps / 's'),
                         '--qmp', self.guest.socket)
            self.assertEqual((self.folder / 'one.s.qcow2').exists(), True)
            self.delete('s', '--partial')
            self.assertEqual(self.files(), ['one.qcow2', 'two.raw'])
            self.guest.close()

    def test_two_users(self):
        """Neither may write to what the other creates, both to the folder."""
        self.need_user(65534, QEMU)
        self.folder.chmod(0o777)
        os.chown(self.snaps, 65533, 65533)
        for path in self.folder.glob('*.*'):
            os.chown(path, 65534, 65534)
            path.chmod(0o666)
        # /proc does not tell from where a name is relative
        self.guest = Guest(self.folder, *(
            re.sub(r'(one|two)\.', rf'{self.folder}/\1.', word)
            for word in self.arguments), user=65534)
        self.addCleanup(self.guest.close)
        os.chmod(self.guest.socket, 0o666)
        self.end(self.start(
            'create', str(self.snaps / 's'), '--qmp', self.guest.socket,
            '--uri', 'exec:cat >/dev/null', user=65533, group=65533))
        self.assertEqual(self.written_to(), ['one.s.qcow2', 'two.s.qcow2'])
