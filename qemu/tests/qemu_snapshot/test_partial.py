# SPDX-License-Identifier: GPL-2.0-or-later

"""
"create" that was killed, and is undone: with which VM, and with none.
"""

import os
import re
import shutil
import time

from case import Case, Guest, disk, free_port, read, write


class Partial(Case):
    """Undoing "create" that was killed."""

    def setUp(self):
        super().setUp()
        self.tcp = f'127.0.0.1:{free_port()}'
        self.also = ('-qmp', f'tcp:{self.tcp},server=on,wait=off')
        # Over TCP, nobody tells from where a name is relative
        self.arguments, self.anew = (
            tuple(re.sub(r'(one|two)\.', rf'{self.folder}/\1.', word)
                  for word in words) for words in (self.arguments, self.anew))

    def boot_tcp(self, *arguments):
        self.boot(*(arguments or self.arguments), *self.also)

    def killed(self, where, address=None):
        self.stopped(
            where, 'create', str(self.snaps / 's'), '--qmp',
            address or self.guest.socket, '--max-bandwidth', '4M')

    def undo(self, *address, code=0, more=()):
        if address:
            more = ('--qmp', *address, *more)
        return self.tool('delete', str(self.snaps / 's'), '--partial', *more,
                         code=code)

    def undone(self, byte):
        self.assertEqual(self.files(), ['one.qcow2', 'two.raw'])
        self.assertEqual((self.folder / 'two.raw').read_bytes()[0], byte)

    def test_by_another_address(self):
        """It is the VM that stands still, whoever asks it."""
        self.boot_tcp()
        self.guest.disk('two', write(2))
        before = self.settings()
        for first, then in ((self.guest.socket, self.tcp),
                            (self.tcp, self.guest.socket),
                            (self.tcp, self.tcp)):
            self.killed('disks.snapshot 1 after kill', first)
            self.assertNotEqual(self.guest.vm.status(), 'running')
            self.undo(then)
            self.assertEqual(self.guest.vm.status(), 'running')
            self.assertEqual(self.written_to(), ['one.qcow2', 'two.raw'])
            self.assertEqual(self.settings(), before)
            self.undone(2)

    def test_same_uuid(self):
        """Another VM, at the address that the first one had."""
        self.boot_tcp()
        self.killed('disks.snapshot 1 after kill', self.tcp)
        self.guest.vm.cmd('migrate-continue', state='pre-switchover')
        while self.guest.vm.status() != 'running':
            time.sleep(0.05)
        self.guest.disk('two', write(7))
        self.undo(code=2)  # It runs
        self.guest.close()
        folder = self.folder / 'other'
        folder.mkdir()
        other = Guest(folder, *self.also)
        self.addCleanup(other.close)
        other.vm.cmd('stop')
        self.undo(code=2)  # It may be the first one
        self.undo(self.tcp, code=2)
        self.assertEqual(other.vm.status(), 'paused')
        self.assertIn('two.s.qcow2', self.files())
        other.close()
        self.undo()
        self.undone(7)

    def test_started_anew(self):
        """The VM was started on its overlays before they were merged."""
        self.boot_tcp()
        self.killed('disks.snapshot 1 after kill', self.tcp)
        self.guest.close()
        self.boot_tcp(*self.anew)
        self.guest.disk('two', write(7))
        self.undo(self.tcp)
        self.guest.disk('two', read(7))
        self.assertEqual(self.written_to(), ['one.qcow2', 'two.raw'])
        self.undone(7)

    def test_started_anew_below(self):
        """It was started on its first disks: one of both is lost."""
        self.boot_tcp()
        self.killed('disks.snapshot 1 after kill')
        self.guest.vm.cmd('migrate-continue', state='pre-switchover')
        self.guest.disk('two', write(7))
        self.guest.close()
        self.boot_tcp()
        self.guest.disk('two', write(8))
        for address in self.tcp, self.guest.socket:
            self.undo(address, code=3)
        self.guest.close()
        self.undo(code=3)
        self.assertEqual(self.files().count('two.s.qcow2'), 1)
        self.undo(more=['--forget'])
        self.assertEqual(self.files(), ['one.qcow2', 'two.raw', 'two.s.qcow2'])

    def test_undone_half(self):
        """QEMU was told to go on with the disk, and was started anew."""
        self.boot_tcp()
        self.killed('disks.snapshot 1 after kill')
        self.stopped('blockjobs.merge 1 after kill', 'delete',
                     str(self.snaps / 's'), '--partial', '--qmp', self.tcp)
        self.guest.disk('one', write(7))
        self.guest.close()
        self.boot_tcp(*self.anew)
        self.guest.disk('one', write(8))
        self.guest.close()
        self.boot('-drive', 'file=two.s.qcow2,if=none,id=d2,format=qcow2',
                  '-device', 'virtio-blk-pci,drive=d2,id=two')
        self.undo(self.guest.socket, code=3)
        self.assertIn('one.s.qcow2', self.files())

    def resumed(self):
        """Killed when the disks have their overlays; the VM goes on."""
        self.killed('disks.snapshot 1 after kill')
        self.guest.vm.cmd('migrate-continue', state='pre-switchover')
        while self.guest.vm.status() != 'running':
            time.sleep(0.05)
        self.guest.disk('two', write(7))

    def test_in_use(self):
        """By a VM that has written nothing yet, and is not named."""
        self.boot()
        self.killed('disks.snapshot 1 after kill')
        self.guest.close()
        self.boot(*self.anew)
        self.undo(code=3)
        self.assertEqual(self.written_to(), ['one.s.qcow2', 'two.s.qcow2'])
        self.assertIn('one.s.qcow2', self.files())
        self.undo(self.guest.socket)
        self.undone(1)

    def test_used_too_early(self):
        """A VM was started on overlays that no VM was told of."""
        self.boot()
        self.killed('disks.prepare 2 after kill')
        self.guest.close()
        self.boot(*self.anew)
        self.guest.disk('two', write(7))
        self.guest.close()
        self.undo()
        self.undone(7)

    def test_stopped_and_off(self):
        """It had begun to merge; what the VM wrote is in the overlays."""
        for where, address in (('QemuImg.commit 1 after kill', ()),
                               ('Merging._note 2 before kill', True)):
            self.boot()
            self.resumed()
            if not address:
                self.guest.close()
            self.stopped(
                where, 'delete', str(self.snaps / 's'), '--partial',
                *(('--qmp', self.guest.socket) if address else ()))
            self.guest.close()
            self.undo()
            self.undone(7)

    def completed(self):
        self.guest.vm.cmd('migrate-set-parameters', max_bandwidth=1 << 30)
        while self.guest.vm.cmd('query-migrate')['status'] != 'completed':
            time.sleep(0.05)

    def nested(self):
        """Another snapshot was taken meanwhile, on the same overlays."""
        self.boot()
        self.resumed()
        self.completed()
        self.create('t')
        self.guest.disk('two', write(8))

    def holds(self):
        vm = self.restore('t')
        disk(vm, 'two', read(7))
        vm.shut()
        self.assertNotIn('two.s.qcow2', self.files())

    def test_below_another(self):
        self.nested()
        self.undo(self.guest.socket)
        self.holds()
        self.delete('t')
        self.undone(8)

    def test_below_another_off(self):
        self.nested()
        self.guest.close()
        self.undo()
        self.holds()
        self.delete('t', online=False)
        self.undone(8)

    def test_above_another(self):
        """What its disks are is not to change before it is undone."""
        self.boot()
        self.create('o')
        self.guest.disk('two', write(2))
        self.resumed()
        self.assertIn('undo it first', self.delete('o', code=2)['error'])
        self.undo(self.guest.socket)
        self.delete('o')
        self.undone(7)

    def test_two_above(self):
        """Its disk would get another base."""
        self.boot()
        self.create('o')
        self.create('p')
        self.guest.disk('two', write(2))
        self.resumed()
        self.assertIn('undo it first', self.delete('o', code=2)['error'])
        self.undo(self.guest.socket)
        self.delete('o')
        self.delete('p')
        self.undone(7)

    def test_beside_a_stale_one(self):
        """The VM has gone on with the first disk, and spoiled a snapshot."""
        self.boot()
        self.create('o')
        self.guest.close()
        self.boot()
        self.create('s', '--uri', 'exec:head -c 1000000 >/dev/null; exit 3',
                    code=1)
        self.assertEqual(self.written_to(), ['one.qcow2', 'two.raw'])

    def test_hidden(self):
        """Overlays that are not to be seen have not been merged."""
        self.boot()
        self.resumed()
        self.guest.close()
        (self.folder / 'two.s.qcow2').rename(self.folder / 'hidden')
        self.undo(code=3)
        (self.folder / 'hidden').rename(self.folder / 'two.s.qcow2')
        self.undo()
        self.undone(7)

    def test_copied(self):
        """Overlays that were put on another file system, say."""
        self.boot()
        self.resumed()
        self.guest.close()
        overlay = self.folder / 'two.s.qcow2'
        shutil.copy2(overlay, self.folder / 'copy')
        (self.folder / 'copy').rename(overlay)
        self.undo(code=3)
        self.image('commit', '-q', 'two.s.qcow2')
        overlay.unlink()
        self.undo(more=['--forget'])
        self.undone(7)

    def test_plugged_again(self):
        """The user has given the VM the disk itself; both have data."""
        self.boot(*self.arguments[:4], '-device', 'virtio-scsi-pci,id=scsi')
        self.killed('disks.snapshot 1 after kill')
        self.guest.vm.cmd('migrate-continue', state='pre-switchover')
        self.completed()
        self.guest.disk('one', write(7))
        self.guest.vm.cmd('human-monitor-command',
                          command_line='drive_del d1')
        self.guest.vm.cmd('blockdev-add', driver='qcow2', node_name='again',
                          file={'driver': 'file', 'filename': str(
                              self.folder / 'one.qcow2')})
        self.guest.vm.cmd('device_add', driver='scsi-hd', drive='again',
                          bus='scsi.0')
        self.undo(self.guest.socket, code=3)
        self.assertIn('one.s.qcow2', self.files())

    def test_older_disk(self):
        """It was put back from a backup, with its times."""
        self.boot()
        self.killed('Create._finish 1 before kill')
        self.guest.disk('two', write(7))
        self.guest.close()
        two = self.folder / 'two.raw'
        two.write_bytes(b'\5' * two.stat().st_size)
        os.utime(two, (1, 1))
        self.undo(code=3)
        self.assertEqual(set(two.read_bytes()), {5})

    def test_creating(self):
        """QEMU was just creating an overlay."""
        for where in 'blockjobs.create 2 before', 'blockjobs._run 2 before':
            self.boot()
            self.killed(f'{where} kill')
            self.undo(self.guest.socket)
            self.undone(1)
            self.assertEqual(self.guest.vm.cmd('query-jobs'), [])
            self.assertEqual([node for node in self.guest.vm.cmd(
                'query-named-block-nodes', flat=True)
                if node['node-name'].startswith('snap-')], [])
            self.guest.close()

    def test_internal(self):
        """By a monitor that does not tell from where names are relative.

        Then by a VM that was started anew.
        """
        self.arguments = tuple(word.replace(f'{self.folder}/', '')
                               for word in self.arguments[:4])
        for anew in False, True:
            self.boot_tcp()
            self.stopped(
                'disks.snapshot 1 after kill', 'create',
                str(self.snaps / 's'), '--qmp', self.guest.socket, '--disks',
                'internal')
            if anew:
                self.guest.close()
                self.boot_tcp()
                self.undo(self.tcp, code=2)
            self.undo(self.guest.socket if anew else self.tcp)
            self.assertEqual(self.image('snapshot', '-U', '-l', 'one.qcow2'),
                             '')
            self.guest.close()

    def test_said_to_be_off(self):
        """Somebody else is at its address now, so it may be the VM."""
        self.boot_tcp()
        self.stopped(
            'Create._finish 1 before kill', 'create', str(self.snaps / 's'),
            '--qmp', self.tcp, '--disks', 'none')
        self.guest.close()
        self.boot_tcp()
        self.undo(code=2)
        self.undo(self.tcp, code=2)
        self.undo(more=['--vm-off'])
        self.undone(0)

    def test_not_begun(self):
        """The VM has never had its overlays: nothing can be in them."""
        self.boot()
        self.killed('disks.prepare 2 after kill')
        self.guest.kill()
        os.utime(self.folder / 'two.raw')
        self.undo()
        self.undone(1)

    def test_damaged(self):
        """What cannot be read is not taken for nothing."""
        self.boot()
        self.killed('disks.snapshot 1 after kill')
        journal = self.snaps / '.s.partial' / 'journal.json'
        good = journal.read_text()
        for bad in good[:100], '{"mode": "external"}':
            journal.write_text(bad)
            self.undo(self.guest.socket, code=2)
        journal.write_text(good)
        self.undo(self.guest.socket)
        self.undone(1)
