# SPDX-License-Identifier: GPL-2.0-or-later

"""
What verify finds.
"""

import ctypes
import json
import os

from case import Case, STOCK
from snapshot.errors import SnapshotError
from snapshot.images import QemuImg


class Damage(Case):
    """What verify finds."""

    def found(self, pattern, *more):
        said = self.tool('verify', str(self.snaps / 's'), *more, code=1)
        self.assertRegex('\n'.join(said['result']['problems']), pattern)

    def test_image(self):
        self.boot()
        self.create('s')
        path = self.snaps / 's' / 'ram'
        size = path.stat().st_size
        with open(path, 'r+b') as file:
            file.seek(size // 2)
            old = file.read(1)
            file.seek(size // 2)
            file.write(bytes([old[0] ^ 1]))
        self.found('checksum')
        self.assertEqual(self.tool('verify', '--quick', str(
            self.snaps / 's'))['result']['problems'], [])
        os.truncate(path, size - 1)
        self.found('size', '--quick')
        path.unlink()
        self.found('No such file', '--quick')

    def test_no_checksum(self):
        """QEMU's own reader finds what is not a stream."""
        self.boot()
        self.create('s', '--no-checksum')
        path = self.snaps / 's' / 'ram'
        with open(path, 'r+b') as file:
            file.seek(100)
            file.write(b'\xff' * 300)
        self.found('analyze-migration')

    def test_disks(self):
        self.boot()
        self.create('s')
        with open(self.folder / 'two.raw', 'r+b') as file:
            file.write(b'x')
        self.found('disk d2: .*written to')
        self.delete('s', code=2)
        self.tool('restore', str(self.snaps / 's'), '--qmp',
                  str(self.folder / 'x.qmp'), code=2)
        (self.folder / 'two.raw').unlink()
        self.found('disk d2: .*No such file')

    def test_manifest(self):
        self.boot()
        self.create('s')
        path = self.snaps / 's' / 'manifest.json'
        whole = json.loads(path.read_text())
        whole.pop('result')  # for people
        for key in [None, *whole]:
            path.write_text(json.dumps({
                name: value for name, value in whole.items()
                if key and name != key}))
            for command in 'verify', 'delete':
                self.tool(command, str(self.snaps / 's'),
                          code=1 if command == 'verify' else 2)
        whole['image']['file'] = '../s/ram'
        path.write_text(json.dumps(whole))
        self.tool('verify', str(self.snaps / 's'), code=1)

    def test_no_image(self):
        self.boot()
        self.create('s')
        (self.snaps / 's' / 'ram').unlink()
        before = self.files()
        said = self.end(self.start_restore('s'), 1)
        self.assertIn('No such file', said['error'])
        self.assertEqual(before, self.files())

    def test_somebody_elses(self):
        """Their manifest would have us run what they like."""
        if os.geteuid() != 0:
            self.skipTest('only root can give files away')
        self.boot()
        self.create('s')
        os.chown(self.snaps / 's' / 'manifest.json', 65534, 65534)
        self.assertIn('belongs to', self.end(self.start_restore('s'), 2)
                      ['error'])
        self.tool('verify', str(self.snaps / 's'))
        self.end(self.start(
            'restore', str(self.snaps / 's'), '--print', '--qmp', 'x.qmp',
            '--command', '--', STOCK, *self.arguments, cwd=self.folder))

    def test_exchanged(self):
        """It is theirs when it is read, and ours when that is looked at."""
        self.boot()
        self.create('s')
        path = self.snaps / 's' / 'manifest.json'
        text = path.read_text()
        path.unlink()
        os.mkfifo(path)
        fd = os.open(path, os.O_RDWR)
        os.write(fd, text.encode())
        self.assertIn('is no file', self.end(self.start_restore('s'), 1)
                      ['error'])
        os.close(fd)
        path.unlink()
        (self.folder / 'elsewhere').write_text(text)
        path.symlink_to(self.folder / 'elsewhere')
        self.end(self.start_restore('s'), 1)

    def test_their_binary(self):
        """They may have changed it since."""
        if os.geteuid() != 0:
            self.skipTest('only root can give files away')
        binary = self.folder / 'theirs'
        binary.write_text('#!/bin/sh\n')
        binary.chmod(0o755)
        self.boot()
        self.create('s')
        path = self.snaps / 's' / 'manifest.json'
        manifest = json.loads(path.read_text())
        manifest['command']['binary'] = str(binary)
        self.guest.close()
        path.write_text(json.dumps(manifest))
        words = ('restore', str(self.snaps / 's'), '--print', '--qmp',
                 str(self.folder / 'x.qmp'))
        self.tool(*words)
        os.chown(binary, 65534, 65534)
        self.assertIn('--binary', self.tool(*words, code=2)['error'])

    def test_log(self):
        """What was made for the VM goes if the log cannot be written."""
        self.boot()
        self.create('s')
        before = self.files()
        self.end(self.start_restore('s', '--log', '/nowhere/log'), 1)
        self.assertEqual(self.files(), before)

    def test_somebody_elses_program(self):
        """The same is true of what is beside the binary that it names."""
        if os.geteuid() != 0:
            self.skipTest('only root can give files away')
        theirs = self.folder / 'theirs'
        theirs.mkdir()
        program = theirs / 'qemu-img'
        program.write_text('#!/bin/sh\necho "{}"\n')
        program.chmod(0o755)

        def runs():
            try:
                return QemuImg(None, str(theirs / 'qemu')).info('/') == {}
            except SnapshotError:
                return False
        self.assertTrue(runs())
        for path in program, theirs:
            os.chown(path, 65534, 65534)
            self.assertFalse(runs())
            os.chown(path, 0, 0)

    def test_may_not_chown(self):
        """A file system where root is nobody, or a container."""
        if os.geteuid() != 0:
            self.skipTest('nobody else may give files away at all')
        os.chown(self.folder / 'two.raw', 65534, 65534)
        self.boot()
        self.create('s')
        libc = ctypes.CDLL(None)
        drop_bounding_set, cap_chown = 24, 0
        self.end_restore(self.start_restore(
            's', preexec_fn=lambda: libc.prctl(drop_bounding_set, cap_chown)))
