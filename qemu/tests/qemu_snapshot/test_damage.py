# SPDX-License-Identifier: GPL-2.0-or-later

"""
What verify finds.
"""

import os

from case import Case


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
        (self.snaps / 's' / 'manifest.json').write_text('{}')
        self.tool('verify', str(self.snaps / 's'), code=1)
