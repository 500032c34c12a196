# SPDX-License-Identifier: GPL-2.0-or-later

"""
Several snapshots of one VM, deleted in any order.
"""

import shutil

from case import BLOCK, Case, ram, disk, read, write


class Chain(Case):
    """Several snapshots of one VM."""

    def three(self):
        self.boot()
        for number in (1, 2, 3):
            self.guest.fill(number)
            for which in ('one', 'two'):
                self.guest.disk(which, write(number, number * BLOCK))
            self.create(f's{number}')
        for which in ('one', 'two'):
            self.guest.disk(which, write(4, 4 * BLOCK))

    def holds(self, *numbers):
        """Each of these snapshots can be restored and is as it was."""
        for number in numbers:
            name = f's{number}'
            self.assertEqual(self.tool('verify', str(self.snaps / name))
                             ['result']['problems'], [])
            vm = self.restore(name)
            self.assertEqual(ram(vm), number)
            for which in ('one', 'two'):
                for block in (1, 2, 3, 4):
                    disk(vm, which, read(block if block <= number else 0,
                                         block * BLOCK))
            vm.shut()

    def guest_holds(self):
        for which in ('one', 'two'):
            for block in (1, 2, 3, 4):
                self.guest.disk(which, read(block, block * BLOCK))

    def disk_holds(self):
        """The same of disks that no VM uses."""
        for name, kind in (('one.qcow2', 'qcow2'), ('two.raw', 'raw')):
            self.image('convert', '-f', kind, '-O', 'raw', name, 'flat')
            data = (self.folder / 'flat').read_bytes()
            self.assertEqual([data[n * BLOCK] for n in (1, 2, 3, 4)],
                             [1, 2, 3, 4])
            (self.folder / 'flat').unlink()

    def test_online(self):
        self.three()
        self.holds(1, 2, 3)
        self.delete('s2')
        self.holds(1, 3)
        self.guest_holds()
        self.delete('s1')
        self.holds(3)
        self.guest_holds()
        self.delete('s3')
        self.guest_holds()
        self.assertEqual(self.written_to(), ['one.qcow2', 'two.raw'])
        self.assertEqual(self.files(), ['one.qcow2', 'two.raw'])

    def test_online_newest_first(self):
        self.three()
        for number in (3, 2, 1):
            self.holds(*range(1, number + 1))
            self.delete(f's{number}')
            self.guest_holds()
        self.assertEqual(self.files(), ['one.qcow2', 'two.raw'])

    def test_online_oldest_first(self):
        """What is above has another base then, but still holds the same."""
        self.three()
        for number in (1, 2, 3):
            self.delete(f's{number}')
            self.holds(*range(number + 1, 4))
            self.guest_holds()
        self.assertEqual(self.files(), ['one.qcow2', 'two.raw'])

    def test_offline_oldest_first(self):
        self.three()
        self.guest.close()
        for number in (1, 2, 3):
            self.delete(f's{number}', online=False)
            self.holds(*range(number + 1, 4))
        self.disk_holds()

    def test_forgotten(self):
        """Half deleted, and then left so: the others are good."""
        self.three()
        self.stopped('blockjobs._run 2 after kill', 'delete',
                     str(self.snaps / 's1'), '--qmp', self.guest.socket)
        self.delete('s1', '--forget')
        self.holds(2, 3)
        self.delete('s3')
        self.guest_holds()

    def test_restored_above(self):
        """It runs on what is two snapshots above, and is named."""
        self.three()
        vm = self.restore('s3')
        self.assertIn('End the VM', self.delete('s1', code=2)['error'])
        vm.shut()
        self.delete('s1')
        self.holds(2, 3)

    def test_offline(self):
        self.three()
        for number in (1, 2, 3):
            self.delete(f's{number}', online=False, code=2)
        self.guest.close()
        self.delete('s2', online=False)
        self.holds(1, 3)
        self.delete('s1', online=False)
        self.holds(3)
        self.delete('s3', online=False)
        self.disk_holds()
        self.assertEqual(self.files(), ['one.qcow2', 'two.raw'])

    def test_after_restart(self):
        """The VM was started again, with its overlays."""
        self.three()
        self.guest.close()
        self.boot('-drive', 'file=one.s3.qcow2,if=none,id=d1,format=qcow2',
                  '-device', 'virtio-blk-pci,drive=d1,id=one',
                  '-blockdev', f'qcow2,node-name=d2,file.driver=file,'
                  f'file.filename={self.folder}/two.s3.qcow2',
                  '-device', 'virtio-blk-pci,drive=d2,id=two')
        self.guest_holds()
        self.guest.fill(4)
        self.create('s4')
        self.holds(1, 2, 3, 4)
        self.delete('s3')
        self.holds(1, 2, 4)
        self.delete('s4')
        self.guest_holds()
        self.delete('s1')
        self.holds(2)
        self.delete('s2')
        self.guest_holds()
        self.assertEqual(self.files(), ['one.qcow2', 'two.raw'])

    def test_needed_by_restored(self):
        self.boot()
        self.create('s1')
        self.create('s2')
        vm = self.restore('s2')
        self.delete('s2', code=2)
        self.delete('s1', code=2)
        vm.shut()
        self.delete('s1')
        self.delete('s2')

    def test_needed_by_unknown(self):
        """Another directory has a snapshot that needs the overlay."""
        self.boot()
        self.create('s1')
        other = self.folder / 'other'
        other.mkdir()
        self.tool('create', str(other / 's2'), '--qmp', self.guest.socket)
        said = self.delete('s1', code=2)
        self.assertIn('one.s2.qcow2', said['error'])

    def test_internal_in_overlay(self):
        """To merge the overlay would lose what is in it."""
        self.boot(*self.arguments[:4])
        self.create('s1')
        self.create('s2', '--disks', 'internal')
        self.assertIn('internal', self.delete('s1', code=2)['error'])
        self.delete('s2')
        self.delete('s1')
        self.assertEqual(self.files(), ['one.qcow2', 'two.raw'])

    def test_internal_below(self):
        """To delete it is to write to the disk of the next snapshot."""
        self.boot(*self.arguments[:4])
        self.guest.disk('one', write(1))
        self.create('s1', '--disks', 'internal')
        self.create('s2')
        self.assertIn('does not write to', self.delete('s1', code=2)['error'])
        self.guest.close()
        self.delete('s1', online=False)
        vm = self.restore('s2')
        disk(vm, 'one', read(1))
        vm.shut()
        self.delete('s2', online=False)
        self.assertEqual(self.files(), ['one.qcow2', 'two.raw'])

    def test_copied(self):
        """A copy is no snapshot, and in nobody's way."""
        self.boot()
        self.create('s')
        shutil.copytree(self.snaps / 's', self.snaps / 's copy')
        self.assertEqual(len(self.tool('list', str(self.snaps))
                             ['result']['snapshots']), 1)
        self.delete('s')
