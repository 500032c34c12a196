# SPDX-License-Identifier: GPL-2.0-or-later

"""
Deleting that stopped half-way, and goes on.
"""

import signal

from case import Case, read, write


class Interrupted(Case):
    """Deleting that stopped half-way, and goes on."""

    def stopped(self, where, online=True, code=-signal.SIGKILL):
        """Delete s, and be killed (or sent a signal) at a place."""
        process = self.start(
            'delete', str(self.snaps / 's'),
            *(('--qmp', self.guest.socket) if online else ()), at=where)
        process.communicate(timeout=60)
        self.assertEqual(process.returncode, code)

    def half(self, where, **options):
        self.boot()
        self.create('s')
        self.guest.disk('two', write(2))
        if not options.get('online', True):
            self.guest.close()
        self.stopped(where, **options)
        self.assertEqual(self.tool('list', str(self.snaps))
                         ['result']['deleting'], ['s'])

    def whole(self, byte):
        self.assertEqual(self.files(), ['one.qcow2', 'two.raw'])
        self.assertEqual((self.folder / 'two.raw').read_bytes()[0], byte)

    def test_after_pivot(self):
        """The VM writes to its disk again, which is newer then."""
        self.half('blockjobs.merge 2 after kill')
        self.assertEqual(self.written_to(), ['one.qcow2', 'two.raw'])
        self.guest.disk('two', write(7))
        self.delete('s')
        self.guest.disk('two', read(7))
        self.whole(7)

    def test_after_pivot_off(self):
        """Nobody can tell, so nothing is overwritten."""
        self.half('blockjobs.merge 2 after kill')
        self.guest.disk('two', write(7))
        self.guest.close()
        self.assertIn('has ended since',
                      self.delete('s', online=False, code=2)['error'])
        (self.folder / 'two.s.qcow2').unlink()
        self.delete('s', online=False)
        self.whole(7)

    def test_before_pivot(self):
        """The job of the first is ready, and would be for ever."""
        self.half('Merged.note 2 before kill')
        self.assertIn('two.s.qcow2', self.written_to())
        self.guest.disk('two', write(7))
        self.delete('s')
        self.guest.disk('two', read(7))
        self.whole(7)

    def test_signal_at_pivot(self):
        self.boot()
        self.create('s')
        self.guest.disk('two', write(7))
        self.stopped('Merged.note 2 after term', code=3)
        self.delete('s')
        self.guest.disk('two', read(7))
        self.whole(7)

    def test_off(self):
        self.half('QemuImg.commit 2 after kill', online=False)
        self.delete('s', online=False)
        self.whole(2)

    def test_off_middle(self):
        """What was above the overlay is above the disk already."""
        self.boot()
        self.create('s')
        self.guest.disk('two', write(2))
        self.create('s2')
        self.guest.disk('two', write(7))
        self.guest.close()
        self.stopped('QemuImg.rebase 2 after kill', online=False)
        self.delete('s', online=False)
        self.delete('s2', online=False)
        self.whole(7)
