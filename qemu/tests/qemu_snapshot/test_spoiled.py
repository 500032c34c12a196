# SPDX-License-Identifier: GPL-2.0-or-later

"""
Disks that were written to behind a snapshot's back: what is newer is never
overwritten by an overlay that does not fit it any more.
"""

import os
import signal
import time

from case import Case, read, write


class Spoiled(Case):
    """Disks that were written to behind a snapshot's back."""

    def spoil(self, *arguments):
        """Start the VM on other disks than it had last."""
        self.boot(*(arguments or self.arguments))
        for which in 'one', 'two':
            if f'id={which}' in ' '.join(arguments or self.arguments):
                self.guest.disk(which, write(7))
        self.guest.close()

    def off(self, name, *more, code=0):
        return self.delete(name, *more, online=False, code=code)

    def problems(self, name):
        process = self.start('verify', str(self.snaps / name), '--quick')
        return self.end(process, process.wait(60))['result']['problems']

    def date(self, seconds, name):
        """As if a file was written to then."""
        then = time.time() + seconds
        os.utime(self.folder / name, (then, then))

    def byte(self, name='two.raw', kind='raw'):
        self.image('convert', '-f', kind, '-O', 'raw', name, 'flat')
        data = (self.folder / 'flat').read_bytes()
        (self.folder / 'flat').unlink()
        return data[0]

    def refused(self, name, *more):
        """It stays as it was; returns why."""
        before = self.files()
        error = self.delete(name, *more, online=bool(more), code=2)['error']
        self.assertEqual(self.files(), before)
        return error

    def test_next(self):
        """That is not made good by deleting the one below."""
        self.two()
        self.spoil(*self.on('s1'))
        self.refused('s2')
        self.assertIn('s2', self.refused('s1'))
        self.assertNotEqual(self.problems('s2'), [])
        self.refused('s2')
        self.off('s2', '--forget')
        for which in 'one', 'two':
            (self.folder / f'{which}.s2.qcow2').unlink()
        self.off('s1')
        self.assertEqual(self.byte(), 7)

    def test_next_later(self):
        """It was spoiled after deleting the one below had begun."""
        self.two()
        self.stopped('Merging._note 1 after kill', 'delete',
                     str(self.snaps / 's1'))
        self.spoil(*self.on('s1'))
        self.assertIn('s2', self.refused('s1'))

    def test_next_but_one(self):
        self.two()
        self.boot(*self.on('s2'))
        self.guest.disk('two', write(4))
        self.create('s3')
        self.guest.close()
        self.spoil(*self.on('s2'))
        self.assertIn('s3', self.refused('s1'))
        self.refused('s3')
        self.assertEqual(self.byte('two.s2.qcow2', 'qcow2'), 7)

    def test_online(self):
        """The VM runs on top of it again."""
        self.two()
        self.spoil(*self.on('s1'))
        self.boot(*self.on('s2'))
        self.refused('s2', '--qmp', self.guest.socket)
        self.assertIn('s2', self.refused('s1', '--qmp', self.guest.socket))
        self.assertNotEqual(self.problems('s2'), [])

    def test_being_spoiled(self):
        """The VM runs on what the next snapshot but one has for its disk."""
        self.two()
        self.boot(*self.on('s2'))
        self.create('s3')
        self.guest.close()
        self.boot(*self.on('s2'))
        self.assertIn('s3', self.refused('s1', '--qmp', self.guest.socket))

    def test_internal(self):
        """To delete that changes the disk of an external one."""
        self.boot(*self.arguments[:4])
        self.create('i', '--disks', 'internal')
        self.create('s')
        self.guest.close()
        self.spoil(*self.arguments[:4])
        self.assertIn('s', self.refused('i'))
        self.refused('s')
        self.off('s', '--forget')
        self.off('i')
        self.assertEqual(self.byte('one.qcow2', 'qcow2'), 7)

    def test_internal_later(self):
        for where in ('Merging._note 1 after kill',
                      'QemuImg.delete_internal 1 after kill'):
            for spoil in False, True:
                self.boot(*self.arguments[:4])
                self.create('i', '--disks', 'internal')
                self.create('s')
                self.guest.close()
                self.stopped(where, 'delete', str(self.snaps / 'i'))
                if spoil:
                    self.spoil(*self.arguments[:4])
                    self.date(60, 'one.qcow2')
                    self.assertIn('s', self.refused('i'))
                    self.refused('s')
                    self.off('s', '--forget')
                    (self.folder / 'one.s.qcow2').unlink()
                    self.off('i')
                else:
                    self.off('i')
                    self.assertEqual(self.problems('s'), [])
                    self.off('s')
                self.assertEqual(self.files(), ['one.qcow2', 'two.raw'])

    def test_in_use(self):
        """By a VM that is on the disk, and has written nothing yet."""
        self.boot(*self.arguments[:4])
        self.create('s')
        self.guest.close()
        self.boot(*self.arguments[:4])
        self.assertIn('one.qcow2', self.refused('s'))
        self.assertEqual(self.problems('s'), [])
        self.guest.disk('one', write(7))
        self.guest.close()
        self.refused('s')
        self.assertEqual(self.byte('one.qcow2', 'qcow2'), 7)

    def test_failed(self):
        """A VM was started on the disk just when that began."""
        for spoil in False, True:
            self.boot(*self.arguments[:4])
            self.create('s')
            self.guest.disk('one', write(2))
            self.guest.close()
            process = self.start('delete', str(self.snaps / 's'),
                                 at='QemuImg.commit 1 before stop')
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
            self.boot(*self.arguments[:4])
            process.send_signal(signal.SIGCONT)
            self.end(process, 3)
            if spoil:
                self.guest.disk('one', write(7))
            self.guest.close()
            self.off('s', code=2 if spoil else 0)
            self.assertEqual(self.byte('one.qcow2', 'qcow2'),
                             7 if spoil else 2)

    def half(self):
        """Merging an overlay was cut off."""
        self.boot(*self.arguments[:4])
        self.create('s')
        self.guest.disk('one', write(2))
        self.guest.close()
        time.sleep(6)  # Nobody has written to the disk for a while
        self.stopped('QemuImg.commit 1 after kill', 'delete',
                     str(self.snaps / 's'))

    def test_cut_off(self):
        """That it is us who have written to the disk is known."""
        self.half()
        self.off('s')
        self.assertEqual(self.byte('one.qcow2', 'qcow2'), 2)

    def test_cut_off_spoiled(self):
        self.half()
        self.spoil(*self.arguments[:4])
        self.date(60, 'one.qcow2')
        self.refused('s')
        self.assertEqual(self.byte('one.qcow2', 'qcow2'), 7)

    def test_merged(self):
        """The next snapshot's disk was written to, before that knew of it."""
        self.two()
        self.stopped('QemuImg.rebase 2 after kill', 'delete',
                     str(self.snaps / 's1'))
        self.spoil(*self.arguments[4:])
        self.date(60, 'two.raw')
        self.off('s1')
        self.assertEqual(len(self.problems('s2')), 1)
        self.refused('s2')
        self.assertEqual(self.byte(), 7)

    def resumed(self):
        """"create" was killed when the disks had their overlays."""
        self.boot()
        self.stopped('disks.snapshot 1 after kill', 'create',
                     str(self.snaps / 's'), '--qmp', self.guest.socket,
                     '--max-bandwidth', '4M')
        self.guest.vm.cmd('migrate-continue', state='pre-switchover')
        while self.guest.vm.status() != 'running':
            time.sleep(0.05)
        for which in 'one', 'two':
            self.guest.disk(which, write(2))
        self.guest.close()

    def test_one_of_two(self):
        """What is done with one disk says nothing about the other."""
        self.resumed()
        self.stopped('Merging._note 1 after kill', 'delete',
                     str(self.snaps / 's'), '--partial')
        time.sleep(6)
        self.spoil(*self.arguments[:4])
        for _ in range(2):
            self.off('s', '--partial', code=3)
            self.assertEqual(self.byte('one.qcow2', 'qcow2'), 7)
        self.assertEqual(self.byte(), 2)

    def test_hidden(self):
        """An overlay that QEMU was never told of to leave."""
        self.boot()
        self.create('s')
        self.stopped('Merging._note 2 after kill', 'delete',
                     str(self.snaps / 's'), '--qmp', self.guest.socket)
        self.stopped('blockjobs.tidy 1 after kill', 'delete',
                     str(self.snaps / 's'), '--qmp', self.guest.socket)
        self.guest.disk('one', write(7))
        self.guest.close()
        overlay = self.folder / 'one.s.qcow2'
        overlay.rename(self.folder / 'hidden')
        self.assertIn('cannot be seen', self.refused('s'))
        (self.folder / 'hidden').rename(overlay)
        self.refused('s')
        self.image('commit', '-q', 'one.s.qcow2')
        overlay.unlink()
        self.off('s')
        self.assertEqual(self.byte('one.qcow2', 'qcow2'), 7)

    def test_told_in_vain(self):
        """QEMU does not do it any more, which is noted."""
        self.boot()
        self.create('s')
        self.stopped('Merging._note 2 after kill', 'delete',
                     str(self.snaps / 's'), '--qmp', self.guest.socket)
        self.image('create', '-q', '-u', '-f', 'qcow2', '-F', 'qcow2', '-b',
                   'two.s.qcow2', 'mine', '64M')
        self.assertIn('mine', self.refused('s', '--qmp', self.guest.socket))
        (self.folder / 'mine').unlink()
        self.guest.disk('one', write(7))
        self.guest.close()
        self.off('s')
        self.assertEqual(self.byte('one.qcow2', 'qcow2'), 7)

    def replace(self):
        """Put two.raw back from a backup, with its times."""
        two = self.folder / 'two.raw'
        backup = self.folder / 'backup'
        backup.write_bytes(bytes([5]) * two.stat().st_size)
        os.utime(backup, (1, 1))
        backup.rename(two)

    def test_replaced(self):
        self.boot()
        self.create('s')
        self.guest.disk('two', write(2))
        self.guest.close()
        self.stopped('QemuImg.commit 2 after kill', 'delete',
                     str(self.snaps / 's'))
        self.replace()
        self.refused('s')
        self.assertEqual(set((self.folder / 'two.raw').read_bytes()), {5})

    def test_replaced_merged(self):
        """All of the overlay was in the disk that is not there any more."""
        self.two()
        self.stopped('QemuImg.rebase 2 after kill', 'delete',
                     str(self.snaps / 's1'))
        self.replace()
        self.refused('s1')

    def test_replaced_partial(self):
        self.resumed()
        self.stopped('QemuImg.commit 2 after kill', 'delete',
                     str(self.snaps / 's'), '--partial')
        self.replace()
        self.off('s', '--partial', code=3)
        self.assertIn('two.s.qcow2', self.files())
        self.assertEqual(set((self.folder / 'two.raw').read_bytes()), {5})

    def test_used_before_noted(self):
        """An overlay of which it was not noted yet what it is when empty."""
        for used in False, True:
            self.boot()
            self.stopped('blockjobs.create_overlay 2 after kill', 'create',
                         str(self.snaps / 's'), '--qmp', self.guest.socket)
            self.guest.close()
            if used:
                self.boot(*self.anew)
                self.guest.disk('two', write(7))
                self.guest.close()
            self.off('s', '--partial')
            self.assertEqual(self.files(), ['one.qcow2', 'two.raw'])
            self.assertEqual(self.byte(), 7 if used else 1)

    def test_read(self):
        """A VM that has only read has spoiled nothing."""
        self.two()
        self.boot(*self.on('s1'))
        self.guest.close()
        for name in 's1', 's2':
            self.off(name)
        self.boot(*self.arguments)
        self.guest.disk('two', read(3))
