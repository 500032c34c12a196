# SPDX-License-Identifier: GPL-2.0-or-later

"""
Files of other users, who may be hostile: root does not write to, nor give
away, what is not theirs, whatever they put in their directories and images.
"""

import json
import os
import shutil
import signal
import time

from case import BLOCK, Case, Guest, QEMU, QEMU_IMG, STOCK, write


THEM = 65534


class Users(Case):
    """Root's secret, and what others try to have done with it."""

    def setUp(self):
        if os.geteuid() != 0:
            self.skipTest('only root can give files away')
        super().setUp()
        self.folder.chmod(0o755)
        (self.folder / 'own').mkdir()
        self.secret = self.folder / 'own' / 'secret'
        self.secret.write_bytes(b'S' * BLOCK)
        self.secret.chmod(0o600)

    def tearDown(self):
        found = self.secret.stat()
        self.assertEqual((found.st_uid, found.st_mode & 0o777), (0, 0o600))
        self.assertEqual(self.secret.read_bytes(), b'S' * BLOCK)
        self.assertEqual(os.listdir(self.folder / 'own'), ['secret'])

    def give(self, *paths):
        for path in paths:
            os.chown(path, THEM, THEM)

    def to_secret(self, path):
        """What they do to a file in a directory of theirs."""
        path.unlink(missing_ok=True)
        path.symlink_to(self.secret)

    def theirs(self):
        """A guest of theirs, in their folder."""
        self.need_user(THEM, QEMU, QEMU_IMG)
        self.give(self.folder, self.snaps, *self.folder.glob('*.*'))
        self.guest = Guest(self.folder, *self.arguments, user=THEM)
        self.addCleanup(self.guest.close)

    def created(self):
        self.boot(*self.arguments[:4])
        self.create('s')

    def meanwhile(self, process, action):
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        action()
        process.send_signal(signal.SIGCONT)
        out = process.communicate(timeout=60)[0]
        return process.returncode, json.loads(out)

    def create_meanwhile(self, where, action):
        return self.meanwhile(self.start(
            'create', str(self.snaps / 's'), '--qmp', self.guest.socket,
            at=f'{where} stop'), action)

    # What we go by

    def refused(self, *more, online=True):
        said = self.delete('s', *more, online=online, code=2)['error']
        self.assertIn('belongs to user', said)
        self.assertIn('chown', said)

    def test_manifest(self):
        """It would have us write to what they have named."""
        self.created()
        path = self.snaps / 's'
        before = self.files()
        for given in path, path / 'manifest.json':
            self.give(given)
            self.refused()
            self.assertEqual(self.files(), before)
            os.chown(given, 0, 0)
        self.give(path, path / 'manifest.json')
        self.delete('s', '--forget')
        self.assertEqual(self.files(), ['one.qcow2', 'one.s.qcow2',
                                        'own/secret', 'two.raw'])

    def test_half_deleted(self):
        self.created()
        self.stopped('Merging._note 2 after kill', 'delete',
                     str(self.snaps / 's'), '--qmp', self.guest.socket)
        path = self.snaps / '.s.deleting'
        for given in path, path / 'manifest.json', path / 'merged.json':
            self.give(given)
            self.refused()
            os.chown(given, 0, 0)
        self.delete('s')

    def test_journal(self):
        self.boot()
        self.stopped('disks.snapshot 1 after kill', 'create',
                     str(self.snaps / 's'), '--qmp', self.guest.socket)
        path = self.snaps / '.s.partial'
        for given in path, path / 'journal.json':
            self.give(given)
            self.refused('--partial')
            os.chown(given, 0, 0)
        self.delete('s', '--partial')
        self.assertEqual(self.written_to(), ['one.qcow2', 'two.raw'])

    # What is beside it

    def neighbour(self, name='t', **changes):
        """A snapshot of theirs, made of ours."""
        path = self.snaps / name
        shutil.copytree(self.snaps / 's', path)
        content = json.loads((path / 'manifest.json').read_text())
        content.update(name=name)
        content['disks']['list'][0].update(changes)
        (path / 'manifest.json').write_text(json.dumps(content))
        (path / 'restored.json').write_text('{"files": {}}')
        self.to_secret(path / 'manifest.json.new')
        self.give(path, path / 'manifest.json', path / 'restored.json')
        self.snaps.chmod(0o1777)
        return content['disks']['list']

    def test_neighbour(self):
        """It can keep us from something, and is not written to."""
        self.created()
        names = {'file': str(self.folder / 'one.s.qcow2'),
                 'overlay': str(self.folder / 'one.t.qcow2')}
        self.neighbour(**names)
        before = self.files()
        for online in True, False:
            said = self.delete('s', code=2, online=online)['error']
            self.assertIn("another user's", said)
            if online:
                self.guest.close()
        self.assertEqual(self.files(), before)
        shutil.rmtree(self.snaps / 't')
        self.delete('s', online=False)

    def test_neighbour_of_another_vm(self):
        """It is in nobody's way, nor is one that is not finished."""
        self.created()
        disks = self.neighbour(file=str(self.folder / 'two.raw'),
                               overlay=str(self.folder / 'two.t.qcow2'))
        (self.snaps / '.u.partial').mkdir()
        journal = self.snaps / '.u.partial' / 'journal.json'
        journal.write_text(json.dumps({'version': 1, 'disks': disks}))
        self.give(journal.parent, journal)
        self.delete('s')
        self.assertEqual(self.written_to(), ['one.qcow2'])

    def test_unfinished_neighbour(self):
        self.created()
        (self.snaps / '.u.partial').mkdir()
        journal = self.snaps / '.u.partial' / 'journal.json'
        journal.write_text(json.dumps({'version': 1, 'disks': [
            {'file': str(self.folder / 'one.s.qcow2')}]}))
        self.give(journal.parent, journal)
        self.assertIn('undo it first', self.delete('s', code=2)['error'])

    def test_above_unfinished(self):
        """Their word is not enough for changing what is on the overlay."""
        self.boot()
        self.stopped('disks.snapshot 1 after kill', 'create',
                     str(self.snaps / 's'), '--qmp', self.guest.socket)
        self.guest.vm.cmd('migrate-continue', state='pre-switchover')
        while self.guest.vm.cmd('query-migrate')['status'] != 'completed':
            time.sleep(0.05)
        self.create('t')
        path = self.snaps / 't' / 'manifest.json'
        self.give(path)
        text = path.read_text()
        self.delete('s', '--partial', code=3)
        self.assertEqual(path.read_text(), text)
        os.chown(path, 0, 0)
        self.delete('s', '--partial')
        self.delete('t')
        self.assertEqual(self.written_to(), ['one.qcow2', 'two.raw'])

    # What we write

    def test_links(self):
        """In place of files that we create."""
        self.created()
        self.to_secret(self.snaps / 's' / 'merged.json.new')
        self.delete('s')
        self.assertEqual(self.files(), ['one.qcow2', 'own/secret', 'two.raw'])
        self.create('s')
        (self.snaps / 's' / 'lock').symlink_to(self.secret.parent / 'new')
        self.delete('s', code=3)

    def test_record(self):
        """Their snapshot, of which we have been told the command line."""
        self.created()
        self.guest.close()
        path = self.snaps / 's'
        self.give(path, path / 'manifest.json')
        self.to_secret(path / 'restored.json.new')
        vm = self.restore('s', '--command', '--', STOCK, '-machine', 'q35',
                          '-accel', 'qtest', '-nodefaults', '-display',
                          'none', '-m', '128M', *(
                              word.replace('one.q', f'{self.folder}/one.q')
                              for word in self.arguments[:4]))
        self.assertEqual(list(json.loads((path / 'restored.json').read_text())
                              ['files']), vm.disks)

    def test_exchanged_directory(self):
        """That which is to get the image, and that which is to be removed."""
        self.theirs()
        victim = self.folder / 'own' / 'victim'
        victim.mkdir()
        files = victim / 'ram', victim / 'other'

        def exchange(name):
            for file in files:
                file.touch(mode=0o600)
            (self.snaps / name).rename(self.snaps / 'away')
            (self.snaps / name).symlink_to(victim)
            os.lchown(self.snaps / name, THEM, THEM)

        def survive(name):
            self.assertEqual({file.stat().st_uid for file in files}, {0})
            self.assertEqual(sorted(victim.iterdir()), sorted(files))
            (self.snaps / name).unlink()
            (self.snaps / 'away').rename(self.snaps / name)
        code, _ = self.create_meanwhile('os.mkdir 1 after', lambda: exchange(
            '.s.partial'))
        self.assertNotEqual(code, 0)
        survive('.s.partial')
        self.delete('s', '--partial')
        self.create('s')
        code, _ = self.meanwhile(
            self.start('delete', str(self.snaps / 's'), '--qmp',
                       self.guest.socket, at='Merging.end 1 after stop'),
            lambda: exchange('.s.deleting'))
        self.assertEqual(code, 3)
        survive('.s.deleting')
        self.delete('s')
        shutil.rmtree(victim)

    def test_overlay(self):
        """Theirs, when it is to get the disk's mode."""
        for path in self.folder.glob('*.*'):
            path.chmod(0o666)
        self.theirs()
        code, _ = self.create_meanwhile(
            'blockjobs.create_overlay 1 after',
            lambda: self.to_secret(self.folder / 'one.s.qcow2'))
        self.assertNotEqual(code, 0)

    def test_their_folder(self):
        """QEMU says where overlays go: where it may not, we do not."""
        self.theirs()
        said = self.create('s', '--overlay-dir', str(self.secret.parent),
                           code=1)['error']
        self.assertIn('ermission', said)

    def test_restored(self):
        """The file that was just created for it."""
        self.created()
        self.guest.close()
        self.give(self.folder, self.folder / 'one.qcow2')
        path = self.folder / 'one.s-restored1.qcow2'
        code, _ = self.meanwhile(
            self.start_restore('s', at='QemuImg.create 1 before stop'),
            lambda: self.to_secret(path))
        self.assertEqual(code, 1)

    # Images that name others

    def data_file(self, name, *more):
        """Make an image's data be that of the secret."""
        path = self.folder / name
        path.unlink()
        false = str(self.secret).replace('secret', 'sXcret')
        self.image('create', '-q', '-f', 'qcow2', '-o',
                   f'data_file={false},data_file_raw=off', *more, name, '64M')
        os.unlink(false)
        path.write_bytes(path.read_bytes().replace(
            false.encode(), str(self.secret).encode()))

    def flat(self):
        self.image('convert', '-f', 'qcow2', '-O', 'raw', 'one.qcow2', 'flat')
        return (self.folder / 'flat').read_bytes()

    def test_off(self):
        """What is theirs is merged with their rights."""
        self.theirs()
        self.guest.disk('one', write(2))
        self.create('s')
        self.guest.disk('one', write(3, BLOCK))
        self.create('t')
        self.guest.disk('one', write(4, 2 * BLOCK))
        self.guest.close()
        self.delete('s', online=False)
        self.delete('t', online=False)
        data = self.flat()
        self.assertEqual([data[n * BLOCK] for n in range(3)], [2, 3, 4])

    def test_overlay_with_data_file(self):
        """It would tell them the secret."""
        self.theirs()
        self.create('s')
        self.guest.close()
        self.data_file('one.s.qcow2', '-u', '-b',
                       str(self.folder / 'one.qcow2'), '-F', 'qcow2')
        self.give(self.folder / 'one.s.qcow2')
        before = self.files()
        self.assertIn('names another file',
                      self.delete('s', online=False, code=2)['error'])
        self.assertEqual(self.files(), before)

    def made_data_file(self, name):
        """Do so, and have the manifest fit it."""
        self.data_file(name)
        state = os.stat(self.folder / name)
        path = self.snaps / 's' / 'manifest.json'
        manifest = json.loads(path.read_text())
        manifest['disks']['list'][0].update(
            {'size': state.st_size, 'mtime-ns': state.st_mtime_ns})
        path.write_text(json.dumps(manifest))
        self.give(self.folder / name)

    def test_disk_with_data_file(self):
        """They would write to it."""
        self.theirs()
        self.create('s')
        self.guest.disk('one', write(2))
        self.guest.close()
        self.made_data_file('one.qcow2')
        self.delete('s', online=False, code=3)

    def test_disk_under_ours(self):
        """With an overlay of ours, since it is us who run QEMU."""
        self.created()
        self.guest.disk('one', write(2))
        self.guest.close()
        self.made_data_file('one.qcow2')
        before = self.files()
        self.assertIn('chown', self.delete('s', online=False, code=2)['error'])
        self.assertEqual(self.files(), before)

    def test_disk_of_ours(self):
        """Their overlay says what is written to it, without having the VM."""
        self.theirs()
        self.create('s')
        self.guest.disk('one', write(2))
        self.guest.close()
        disk = self.folder / 'one.qcow2'
        os.chown(disk, 0, 0)
        before = self.files()
        self.assertIn('chown', self.delete('s', online=False, code=2)['error'])
        self.assertEqual(self.files(), before)
        self.give(disk)
        self.delete('s', online=False)
        self.assertEqual(self.flat()[0], 2)

    def test_internal(self):
        """Copies of their disk are made with their rights."""
        self.arguments = self.arguments[:4]
        self.theirs()
        self.guest.disk('one', write(2))
        self.create('s', '--disks', 'internal')
        self.guest.disk('one', write(3))
        self.guest.close()
        vm = self.restore('s')
        path = vm.disks[0]
        self.assertEqual(os.stat(path).st_uid, THEM)
        vm.cmd('quit')
        data = self.image('convert', '-U', '-f', 'qcow2', '-O', 'raw', path,
                          'flat')
        self.assertEqual((self.folder / 'flat').read_bytes()[0], 2, data)
        vm.shut()
        self.delete('s', online=False)
        self.assertEqual(self.image('snapshot', '-l', 'one.qcow2'), '')

    def test_internal_on_secret(self):
        """The copy is theirs, and would have it."""
        self.arguments = self.arguments[:4]
        self.theirs()
        self.create('s', '--disks', 'internal')
        self.guest.close()
        self.image('rebase', '-u', '-f', 'qcow2', '-b', str(self.secret),
                   '-F', 'raw', 'one.qcow2')
        before = self.files()
        said = self.end(self.start_restore('s'), 1)['error']
        self.assertIn('ermission', said)
        self.assertEqual(self.files(), before)

    # What is no image

    def test_pipes(self):
        """Nobody has us wait for ever."""
        self.created()
        self.guest.close()
        for path, command, code in (
                (self.snaps / 's' / 'ram', 'verify', 1),
                (self.folder / 'one.s.qcow2', 'delete', 2)):
            path.unlink()
            os.mkfifo(path)
            process = self.start(command, str(self.snaps / 's'))
            self.addCleanup(process.kill)
            process.wait(20)
            self.end(process, code)
