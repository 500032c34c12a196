# SPDX-License-Identifier: GPL-2.0-or-later

"""
Snapshots and VMs that deleting another snapshot has to leave as they are,
though they are elsewhere, or not to be seen.
"""

import os
import shutil
import signal
import subprocess
import time

from case import Case, disk, read, write


class Others(Case):
    """What deleting a snapshot must leave as it is."""

    def refused(self, place):
        """It stays as it was; returns why."""
        before = self.files()
        error = self.tool('delete', str(place), code=2)['error']
        self.assertEqual(self.files(), before)
        return error

    def good(self, place):
        self.assertEqual(self.tool('verify', str(place), '--quick')
                         ['result']['problems'], [])

    def make(self, name):
        folder = self.folder / name
        folder.mkdir()
        return folder

    def test_hidden(self):
        """The next snapshot's overlay, which is on what would go."""
        self.two()
        away = self.make('away') / 'hidden'
        (self.folder / 'one.s2.qcow2').rename(away)
        self.assertIn('one.s2.qcow2', self.refused(self.snaps / 's1'))
        away.rename(self.folder / 'one.s2.qcow2')
        self.delete('s1', online=False)
        self.delete('s2', online=False)
        self.assertEqual((self.folder / 'two.raw').read_bytes()[0], 3)

    def test_restored_gone(self):
        """A VM that was restored for a test is removed with its folder."""
        self.boot()
        self.create('s')
        self.create('t')
        folder = self.make('try')
        self.restore('s', '--overlay-dir', str(folder)).shut()
        shutil.rmtree(folder)
        self.assertIn('--restored-gone', self.tool(
            'delete', str(self.snaps / 's'), '--qmp', self.guest.socket,
            code=2)['error'])
        self.delete('s', '--restored-gone')
        self.delete('t')

    def test_link(self):
        """One that is moved on to the latest overlay is no disk's name."""
        self.boot()
        links = [self.folder / name for name in ('a.qcow2', 'z.qcow2')]
        for name in 's', 't', 'u':
            self.create(name)
            for link in links:
                link.unlink(missing_ok=True)
                link.symlink_to(f'one.{name}.qcow2')
            if name == 't':
                links = [*links, *(self.folder / f'{n}.qcow2'
                                   for n in range(8))]
        self.guest.close()
        for link in links:
            link.unlink()
            link.symlink_to('one.t.qcow2')
        self.delete('s', online=False)
        for link in links:
            link.unlink()
            link.symlink_to('one.u.qcow2')
        self.good(self.snaps / 'u')
        self.delete('t', online=False)
        self.delete('u', online=False)

    def test_put_back(self):
        """From a backup, to where it was: it is no copy of itself."""
        self.boot()
        self.create('s')
        backup = self.folder / 'backup'
        shutil.copytree(self.snaps, backup)
        shutil.rmtree(self.snaps)
        shutil.copytree(backup, self.snaps)
        self.stopped('blockjobs.merge 1 before kill', 'delete',
                     str(self.snaps / 's'), '--qmp', self.guest.socket)
        self.delete('s')

    def test_old_record(self):
        """An earlier version had less to say of restored VMs."""
        self.boot()
        self.create('s')
        (self.snaps / 's/restored.json').write_text(
            f'{{"files": ["{self.folder}/one.s-restored1.qcow2"]}}')
        self.restore('s').shut()
        for path in self.folder.glob('*restored*'):
            path.unlink()
        self.delete('s')

    def test_hidden_two_above(self):
        """That of the next but one is on what stays."""
        self.two()
        self.boot(*self.on('s2'))
        self.create('s3')
        self.guest.disk('two', write(4))
        self.guest.close()
        away = self.make('away') / 'hidden'
        (self.folder / 'two.s3.qcow2').rename(away)
        self.delete('s1', online=False)
        self.assertIn('two.s3.qcow2', self.refused(self.snaps / 's2'))
        away.rename(self.folder / 'two.s3.qcow2')
        for name in 's2', 's3':
            self.delete(name, online=False)
        self.assertEqual((self.folder / 'two.raw').read_bytes()[0], 4)

    def test_hidden_forgotten(self):
        """The next snapshot is not needed any more, nor its overlay."""
        self.two()
        (self.folder / 'one.s2.qcow2').unlink()
        self.assertIn('s2', self.refused(self.snaps / 's1'))
        self.delete('s2', '--forget', online=False)
        (self.folder / 'two.s2.qcow2').unlink()
        self.delete('s1', online=False)
        self.assertEqual((self.folder / 'two.raw').read_bytes()[0], 2)

    def test_elsewhere(self):
        """Both, the next snapshot and its overlays."""
        self.boot()
        self.create('s1')
        self.guest.disk('two', write(2))
        other, overlays = self.make('other'), self.make('overlays')
        self.tool('create', str(other / 's2'), '--qmp', self.guest.socket,
                  '--overlay-dir', str(overlays))
        self.guest.disk('two', write(3))
        self.guest.close()
        self.assertIn('one.s2.qcow2', self.refused(self.snaps / 's1'))
        away = overlays.rename(self.folder / 'away')
        self.assertIn('one.s2.qcow2', self.refused(self.snaps / 's1'))
        away.rename(overlays)
        self.good(other / 's2')
        self.tool('delete', str(other / 's2'))
        self.delete('s1', online=False)
        self.assertEqual(self.files(), ['one.qcow2', 'two.raw'])
        self.assertEqual((self.folder / 'two.raw').read_bytes()[0], 3)

    def test_elsewhere_undone(self):
        """Nothing stays of a snapshot that has failed, or was killed."""
        self.boot()
        self.create('s1')
        other, overlays = self.make('other'), self.make('overlays')
        before = self.files()
        words = ('create', str(other / 's2'), '--qmp', self.guest.socket,
                 '--overlay-dir', str(overlays))
        self.tool(*words, '--uri', 'exec:exit 1', code=1)
        self.assertEqual(self.files(), before)
        self.stopped('disks.prepare 2 before kill', *words)
        self.tool('delete', str(other / 's2'), '--partial', '--qmp',
                  self.guest.socket)
        self.assertEqual(self.files(), before)

    def test_no_disk(self):
        """There is a way on."""
        self.two()
        (self.folder / 'one.s1.qcow2').rename(self.folder / 'hidden')
        self.assertIn('--forget', self.refused(self.snaps / 's2'))
        (self.folder / 'hidden').rename(self.folder / 'one.s1.qcow2')
        self.image('rebase', '-u', '-b', 'one.qcow2', '-F', 'qcow2',
                   'one.s2.qcow2')
        self.assertIn('--forget', self.refused(self.snaps / 's2'))

    def test_restored_hidden(self):
        """Where its overlays are is not mounted now."""
        self.boot()
        self.create('s')
        self.create('t')
        far = self.make('far')
        vm = self.restore('s', '--overlay-dir', str(far))
        disk(vm, 'one', write(9))
        away = far.with_name('away')
        vm.cmd('quit')
        far.rename(away)
        self.delete('t')  # They are not on that
        self.guest.close()
        for _ in range(2):
            self.assertIn(str(far), self.refused(self.snaps / 's'))
            far.mkdir(exist_ok=True)  # Where it was mounted
        far.rmdir()
        near = self.restore('s')
        near.shut()
        self.assertIn(str(far), self.refused(self.snaps / 's'))
        away.rename(far)
        self.refused(self.snaps / 's')
        for path in far.iterdir():
            path.unlink()
        self.delete('s', online=False)

    def three(self):
        """The third is in another directory."""
        self.two()
        self.boot(*self.on('s2'))
        other = self.make('other')
        self.tool('create', str(other / 's3'), '--qmp', self.guest.socket)
        self.guest.disk('two', write(4))
        return other / 's3'

    def test_two_above(self):
        """It is not told that its disk has another base."""
        for online in True, False:
            third = self.three()
            if not online:
                self.guest.close()
            self.delete('s1', online=online)
            self.good(third)
            self.good(self.snaps / 's2')
            vm = self.end_restore(self.start(
                'restore', str(third), '--qmp', str(self.folder / 'r.qmp'),
                '--replace', f'unix:{self.folder}/vm.qtest,server=on,wait=off',
                'null'))
            disk(vm, 'two', read(3))
            vm.shut()
            if online:
                self.guest.close()
            self.tool('delete', str(third))
            self.delete('s2', online=False)
            self.assertEqual((self.folder / 'two.raw').read_bytes()[0], 4)
            third.parent.rmdir()

    def test_partial_forgotten(self):
        """What was merged by then is known to the next snapshot."""
        self.boot()
        self.stopped('disks.snapshot 1 after kill', 'create',
                     str(self.snaps / 's'), '--qmp', self.guest.socket,
                     '--max-bandwidth', '4M')
        self.guest.vm.cmd('migrate-continue', state='pre-switchover')
        while self.guest.vm.status() != 'running':
            time.sleep(0.05)
        self.guest.disk('two', write(7))
        self.guest.vm.cmd('migrate-set-parameters', max_bandwidth=1 << 30)
        while self.guest.vm.cmd('query-migrate')['status'] != 'completed':
            time.sleep(0.05)
        self.create('t')
        self.guest.disk('two', write(8))
        self.stopped('Merging._note 2 before kill', 'delete',
                     str(self.snaps / 's'), '--partial', '--qmp',
                     self.guest.socket)
        self.delete('s', '--partial', '--forget')
        self.good(self.snaps / 't')
        vm = self.restore('t')
        disk(vm, 'two', read(7))
        vm.shut()
        self.assertIn('one.s.qcow2', self.delete('t', code=2)['error'])
        (self.folder / 'one.s.qcow2').unlink()
        self.delete('t')
        self.guest.disk('two', read(8))
        self.assertEqual(self.written_to(), ['one.qcow2', 'two.s.qcow2'])

    def test_restore_meanwhile(self):
        """It waits until what is below its disk does not change any more."""
        self.two()
        deleting = self.start('delete', str(self.snaps / 's1'),
                              at='Merging._tell 1 before stop')
        os.waitid(os.P_PID, deleting.pid, os.WSTOPPED)
        restoring = self.start_restore('s2')
        with self.assertRaises(subprocess.TimeoutExpired):
            restoring.wait(2)
        deleting.send_signal(signal.SIGCONT)
        # The second disk's overlay is that of a VM by then, or the VM is late
        deleting.communicate(timeout=60)
        self.assertIn(deleting.returncode, (0, 3))
        vm = self.end_restore(restoring)
        disk(vm, 'two', read(2))
        for path in vm.disks:
            self.image('map', '-U', path)
        vm.shut()
        if deleting.returncode:
            self.delete('s1', online=False)
        self.delete('s2', online=False)
        self.assertEqual((self.folder / 'two.raw').read_bytes()[0], 3)

    def test_copy(self):
        """To delete it would be to make the first one useless."""
        self.boot()
        self.create('s')
        self.guest.disk('two', write(2))
        other = self.make('other')
        shutil.copytree(self.snaps / 's', other / 's')
        self.good(other / 's')
        words = ('delete', str(other / 's'), '--qmp', self.guest.socket)
        before = self.files()
        self.assertIn('--forget', self.tool(*words, code=2)['error'])
        self.assertEqual(self.files(), before)
        # The first one may be where nobody looks
        away = self.snaps.rename(self.folder / 'away')
        self.tool(*words, code=2)
        away.rename(self.snaps)
        self.tool(*words, '--forget')
        self.good(self.snaps / 's')
        self.delete('s')
        self.assertEqual(self.files(), ['one.qcow2', 'two.raw'])

    def test_moved(self):
        """That is no copy; a link to the directory is neither."""
        self.boot()
        self.create('s1')
        self.create('s2')
        moved = self.snaps.rename(self.folder / 'moved')
        self.tool('delete', str(moved / 's1'), '--qmp', self.guest.socket)
        self.snaps.symlink_to(moved)
        self.delete('s2')
        self.assertEqual(self.files(), ['one.qcow2', 'two.raw'])

    def test_mark(self):
        """The VM keeps nothing of a snapshot that was forgotten."""
        self.boot()
        self.create('s')
        before = self.settings()
        self.stopped('Merging._note 1 after kill', 'delete',
                     str(self.snaps / 's'), '--qmp', self.guest.socket)
        self.assertNotEqual(self.settings(), before)
        self.delete('s', '--forget')
        self.assertEqual(self.settings(), before)
