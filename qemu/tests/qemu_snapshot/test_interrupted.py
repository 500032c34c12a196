# SPDX-License-Identifier: GPL-2.0-or-later

"""
Deleting that stopped half-way, and goes on.
"""

import os
import signal
import subprocess

from case import Case, disk, free_port, read, write
from snapshot.images import base_of


class Interrupted(Case):
    """Deleting that stopped half-way, and goes on."""

    def stop(self, where, online=True, **options):
        """Delete s, and be stopped."""
        self.stopped(where, 'delete', str(self.snaps / 's'),
                     *(('--qmp', self.guest.socket) if online else ()),
                     **options)

    def half(self, where, **options):
        self.boot()
        self.create('s')
        self.guest.disk('two', write(2))
        if not options.get('online', True):
            self.guest.close()
        self.stop(where, **options)
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
        self.assertIn('who knew how far',
                      self.delete('s', online=False, code=2)['error'])
        (self.folder / 'two.s.qcow2').unlink()
        self.delete('s', online=False)
        self.whole(7)

    def test_before_pivot(self):
        """The job of the first is ready, and would be for ever."""
        self.half('Merging._note 2 before kill')
        self.assertIn('two.s.qcow2', self.written_to())
        self.guest.disk('two', write(7))
        self.delete('s')
        self.guest.disk('two', read(7))
        self.whole(7)

    def test_signal_at_pivot(self):
        self.boot()
        self.create('s')
        self.guest.disk('two', write(7))
        self.stop('Merging._note 2 after term', code=3)
        self.delete('s')
        self.guest.disk('two', read(7))
        self.whole(7)

    def test_told_twice(self):
        """That QEMU was told to go on with the disk is not forgotten."""
        self.half('Merging._note 2 after kill')
        [job] = self.guest.vm.cmd('query-jobs')
        self.stop('blockjobs.tidy 1 before kill')
        self.guest.vm.cmd('job-complete', id=job['id'])
        while 'one.s.qcow2' in self.written_to():
            pass
        self.guest.disk('one', write(7))
        self.guest.close()
        before = self.image('map', '-U', '--output=json', 'one.qcow2')
        self.delete('s', online=False, code=2)
        self.assertEqual(before, self.image('map', '--output=json',
                                            'one.qcow2'))

    def test_used_again(self):
        """A VM was started on an overlay that was merged already."""
        self.half('Merging._note 3 after kill')
        self.assertEqual(self.written_to(), ['one.qcow2', 'two.s.qcow2'])
        self.guest.close()
        self.boot(*self.anew)
        self.guest.disk('one', write(7))
        self.guest.disk('two', write(7))
        self.delete('s')
        for which in 'one', 'two':
            self.guest.disk(which, read(7))
        self.assertEqual(self.written_to(), ['one.qcow2', 'two.raw'])
        self.whole(7)

    def test_used_again_off(self):
        self.half('Merging._note 3 after kill')
        self.guest.close()
        self.boot(*self.anew)
        self.guest.disk('one', write(7))
        self.guest.close()
        self.delete('s', online=False, code=2)
        self.assertIn('one.s.qcow2', self.files())

    def test_used_by_another(self):
        """By one that runs, and has written nothing yet."""
        self.half('Merging._note 3 after kill')
        self.guest.close()
        self.boot(*self.anew)
        self.delete('s', online=False, code=2)
        self.delete('s')
        self.whole(2)

    def test_started_anew(self):
        """It is not the VM that was told to go on with the disk."""
        self.half('blockjobs.merge 1 after kill')
        self.guest.close()
        self.boot()
        self.assertIn('who knew how far', self.delete('s', code=2)['error'])
        self.assertIn('one.s.qcow2', self.files())

    def test_used_both(self):
        """The disk first, then the overlay: nobody knows which is right."""
        self.half('Merging._note 3 after kill')
        self.guest.disk('one', write(7))
        self.guest.close()
        self.boot(*self.anew)
        before = self.files()
        self.delete('s', code=2)
        self.create('s2')
        self.guest.close()
        self.delete('s', online=False, code=2)
        self.assertEqual(self.tool('verify', str(self.snaps / 's2'))
                         ['result']['problems'], [])
        self.delete('s2', online=False, code=2)
        self.delete('s', '--forget', online=False)
        self.delete('s2', online=False)
        self.assertEqual([name for name in before if '/' not in name],
                         self.files())

    def test_used_below(self):
        """The disk whose overlay nobody has begun to merge."""
        self.half('Merging._note 3 after kill')
        self.guest.close()
        self.boot()
        self.guest.disk('two', write(7))
        self.delete('s', code=2)
        self.guest.close()
        self.delete('s', online=False, code=2)
        self.assertEqual((self.folder / 'two.raw').read_bytes()[0], 7)

    def test_used_instead(self):
        """Nothing was merged yet; the VM was started on the disk."""
        self.half('Merging._note 1 after kill', online=False)
        notes = self.snaps / '.s.deleting' / 'merged.json'
        for path in notes, self.folder / 'one.s.qcow2':
            os.utime(path, (1, 1))  # As if that was a while ago
        self.boot()
        self.guest.disk('one', write(7))
        self.guest.close()
        before = self.image('map', '--output=json', 'one.qcow2')
        self.assertIn('who knew how far',
                      self.delete('s', online=False, code=2)['error'])
        self.assertEqual(before, self.image('map', '--output=json',
                                            'one.qcow2'))

    def test_used_instead_ready(self):
        """The same, and all of the overlay was in the disk by then."""
        self.half('Merging._note 2 before kill')
        self.guest.close()
        for path in (self.snaps / '.s.deleting' / 'merged.json',
                     self.folder / 'one.s.qcow2'):
            os.utime(path, (1, 1))
        self.boot(*self.arguments)
        self.guest.disk('one', write(9))
        self.guest.close()
        self.delete('s', online=False, code=2)
        self.boot(*self.anew)
        self.delete('s')
        self.guest.disk('one', read(9))

    def test_one_behind(self):
        """The VM runs on what the next snapshot holds, and would change it."""
        self.boot()
        self.create('s')
        self.create('s2')
        self.guest.close()
        self.boot(*self.anew)
        self.assertIn('one.s2.qcow2', self.delete('s', code=2)['error'])
        self.assertEqual(self.written_to(), ['one.s.qcow2', 'two.s.qcow2'])

    def test_forget_job(self):
        """That of the killed program goes, too."""
        self.half('Merging._note 2 before kill')
        self.delete('s', '--forget')
        self.assertEqual(self.guest.vm.cmd('query-jobs'), [])
        self.create('s2')

    def test_hidden(self):
        """Overlays that are not to be seen have not been merged."""
        self.boot()
        self.create('s')
        self.guest.close()
        (self.folder / 'two.s.qcow2').rename(self.folder / 'hidden')
        self.delete('s', online=False, code=2)
        (self.folder / 'hidden').rename(self.folder / 'two.s.qcow2')
        self.delete('s', online=False)

    def test_again_and_again(self):
        self.boot()
        self.create('s')
        self.guest.disk('two', write(2))
        for where in ('Merging._note 3 before', 'Merging._note 4 after',
                      'Merging.settle 1 before', 'os.unlink 1 before'):
            self.stop(f'{where} kill')
        self.delete('s')
        self.whole(2)

    def test_forget(self):
        self.boot()
        self.create('s')
        self.delete('s', '--forget', online=False)
        self.assertEqual(self.written_to(), ['one.s.qcow2', 'two.s.qcow2'])
        self.assertNotIn('snaps', ''.join(self.files()))

    def test_qemu_killed_in_the_middle(self):
        """Of a chain: what is above the overlay has just been changed."""
        self.boot(*self.arguments[:4])
        self.create('s')
        self.guest.disk('one', write(2))
        self.create('s2')
        process = self.start('delete', str(self.snaps / 's'), '--qmp',
                             self.guest.socket)
        above = str(self.folder / 'one.s2.qcow2')
        while base_of(above).endswith('one.s.qcow2'):
            self.assertIsNone(process.poll())
        self.guest.kill()
        self.end(process, 3)
        self.delete('s', online=False)
        vm = self.restore('s2')
        disk(vm, 'one', read(2))

    def test_node_of_command_line(self):
        """It stays when it is no disk any more, and keeps the file open."""
        self.boot()
        self.create('s')
        self.guest.close()
        self.boot(*self.anew)
        self.stop('blockjobs._run 2 after kill')
        self.delete('s')
        self.whole(1)

    def test_neighbours(self):
        """One after the other."""
        self.boot()
        self.create('s')
        self.guest.disk('two', write(2))
        self.create('s2')
        self.stop('Merging._note 1 after kill')
        self.assertIn('s is half deleted',
                      self.delete('s2', code=2)['error'])
        self.delete('s')
        self.delete('s2')
        self.whole(2)

    def test_at_a_time(self):
        self.boot()
        self.create('s')
        self.create('s2')
        process = self.start('delete', str(self.snaps / 's'), '--qmp',
                             self.guest.socket, at='Merging.settle 1 before '
                             'stop')
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        self.delete('s2', online=False, code=2)
        process.send_signal(signal.SIGCONT)
        self.end(process)
        self.delete('s2')

    def test_relative_name(self):
        """Nobody tells from where: nothing is taken for something else."""
        tcp = f'127.0.0.1:{free_port()}'
        self.boot(*self.arguments, '-qmp', f'tcp:{tcp},server=on,wait=off')
        self.create('s')
        before = self.files()
        self.tool('delete', str(self.snaps / 's'), '--qmp', tcp, code=2)
        self.assertEqual(self.files(), before)
        self.delete('s')

    def test_nearly_gone(self):
        """All is done but for the last files."""
        for where in 'shutil.rmtree 1 before kill', 'os.rmdir 1 before kill':
            self.half(where)
            self.delete('s')
            self.whole(2)
            self.guest.close()

    def test_full(self):
        """There is no room for notes until the image is gone."""
        self.boot()
        self.snaps = self.mount('size=80m')
        self.create('s', '--ignore-space')
        full = subprocess.run(
            ['dd', 'if=/dev/zero', 'bs=4k', f'of={self.snaps}/more'],
            check=False, stderr=subprocess.PIPE)
        self.assertIn(b'No space', full.stderr)
        self.delete('s')
        self.assertEqual(self.written_to(), ['one.qcow2', 'two.raw'])

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
        self.stop('QemuImg.rebase 2 after kill', online=False)
        self.delete('s', online=False)
        self.delete('s2', online=False)
        self.whole(7)
