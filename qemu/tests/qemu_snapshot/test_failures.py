# SPDX-License-Identifier: GPL-2.0-or-later

"""
Snapshots that fail: afterwards all is as it was before.
"""

import os
import signal
import subprocess
import time
from functools import partial

from case import BLOCK, Case, Guest, QEMU, STOCK, read, write


class Failures(Case):
    """Snapshots that fail, after which all is as before."""

    def into(self, folder, *more, code):
        return self.tool('create', str(folder / 's'), '--qmp',
                         self.guest.socket, *more, code=code)

    def test_full(self):
        folder = self.mount('size=16m')
        self.boot()
        self.unchanged(lambda: self.into(folder, code=2))
        for more in ((), ('--format', 'mapped-ram', '--channels', '2')):
            self.unchanged(lambda m=more: self.into(
                folder, '--ignore-space', *m, code=1))
        subprocess.run(['mount', '-o', 'remount,size=200m', str(folder)],
                       check=True)
        self.into(folder, '--ignore-space', code=0)

    def test_read_only(self):
        folder = self.mount('ro')
        self.boot()
        self.unchanged(lambda: self.into(folder, code=2))

    def test_no_directory(self):
        self.boot()
        self.unchanged(lambda: self.into(self.folder / 'nowhere', code=2))

    def test_collisions(self):
        self.boot()
        self.create('s')
        self.create('s', code=2)
        (self.folder / 'one.t.qcow2').touch()
        self.create('t', code=2)
        (self.folder / 'one.t.qcow2').unlink()
        self.create('t')
        self.create('.t', code=2)

    def test_sink_dies(self):
        self.boot()
        self.unchanged(lambda: self.create(
            's', '--uri', 'exec:head -c 1000000 >/dev/null; exit 3', code=1))

    def test_trap(self):
        self.boot()
        self.unchanged(lambda: self.create('s', '--trap', 'no', code=2))

    def test_buffer(self):
        self.boot()
        self.unchanged(lambda: self.create('s', '--buffer', '1000G', code=1))

    def test_stall_limit(self):
        self.boot()
        self.unchanged(lambda: self.create('s', '--stall-limit', '-1', code=1))
        self.create('s', '--stall-limit', '50')

    def test_timeout(self):
        self.boot()
        self.guest.vm.cmd('migrate-set-parameters', max_bandwidth=4 << 20)
        self.unchanged(lambda: self.create('s', '--timeout', '1', code=1))

    def slow(self, *more):
        """A snapshot that is being written."""
        process = self.start('create', str(self.snaps / 's'), '--qmp',
                             self.guest.socket, '--max-bandwidth', '2M', *more)
        for _ in range(2400):
            info = self.guest.vm.cmd('query-migrate')
            if info.get('status') == 'active' and \
                    info.get('ram', {}).get('transferred', 0) > 1 << 20:
                return process
            if process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(info)

    def test_signals(self):
        self.boot()
        self.guest.vm.cmd('migrate-set-parameters', max_bandwidth=128 << 20)
        for number in (signal.SIGINT, signal.SIGTERM):
            def interrupt(number=number):
                process = self.slow()
                self.guest.disk('one', write(7, 8 * BLOCK))
                process.send_signal(number)
                self.end(process, 130)
                self.guest.disk('one', read(7, 8 * BLOCK))
            self.unchanged(interrupt)

    def test_qemu_killed(self):
        self.boot()
        process = self.slow()
        self.guest.disk('two', write(7))
        self.guest.kill()
        self.end(process, 1)
        self.assertEqual(self.files(), ['one.qcow2', 'two.raw'])
        self.assertEqual((self.folder / 'two.raw').read_bytes()[0], 7)

    def killed(self):
        self.boot()
        process = self.slow()
        self.guest.disk('two', write(7))
        process.kill()
        process.communicate()
        found = self.tool('list', str(self.snaps))['result']
        self.assertEqual((found['snapshots'], found['partial']), ([], ['s']))
        self.create('s', code=2)
        self.delete('s', code=2)

    def test_tool_killed(self):
        self.killed()
        self.delete('s', '--partial', online=False, code=2)
        self.delete('s', '--partial')
        self.assertEqual(self.written_to(), ['one.qcow2', 'two.raw'])
        self.assertEqual(self.files(), ['one.qcow2', 'two.raw'])
        self.guest.disk('two', read(7))
        self.assertEqual(self.settings()[0]['background-snapshot'], False)
        self.create('s')

    def test_both_killed(self):
        self.killed()
        self.guest.kill()
        self.delete('s', '--partial', online=False)
        self.assertEqual(self.files(), ['one.qcow2', 'two.raw'])
        self.assertEqual((self.folder / 'two.raw').read_bytes()[0], 7)

    def test_wrong_vm(self):
        """Another VM is left alone, and the right one is not forgotten."""
        self.killed()
        folder = self.folder / 'other'
        folder.mkdir()
        other = Guest(folder)
        self.addCleanup(other.close)
        other.vm.cmd('stop')
        self.tool('delete', str(self.snaps / 's'), '--partial', '--qmp',
                  other.socket, code=2)
        self.assertEqual(other.vm.status(), 'paused')
        self.delete('s', '--partial')
        self.assertEqual(self.files(), ['one.qcow2', 'two.raw'])

    def test_no_disks_killed(self):
        self.boot()
        process = self.slow('--disks', 'none')
        process.kill()
        process.communicate()
        self.delete('s', '--partial', online=False, code=2)
        self.delete('s', '--partial')
        self.assertEqual(self.settings()[0]['background-snapshot'], False)

    def test_nobody_listens(self):
        """The terminal has gone away."""
        self.boot()
        for stream, more, code in (
                ('stderr', ('--uri', 'exec:exit 1'), 1), ('stdout', (), 0)):
            def gone(stream=stream, more=more, code=code):
                ends = os.pipe()
                os.close(ends[0])
                process = self.start('create', str(self.snaps / 's'), '-v',
                                     '--qmp', self.guest.socket, *more,
                                     **{stream: ends[1]})
                os.close(ends[1])
                process.communicate(timeout=60)
                self.assertEqual(process.returncode, code)
            if code:
                self.unchanged(gone)
            else:
                gone()
        for number, stream in enumerate(('stdin', 'stdout', 'stderr')):
            process = self.start(
                'create', str(self.snaps / stream), '--qmp',
                self.guest.socket, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                preexec_fn=partial(os.close, number))
            self.assertEqual(process.wait(60), 0)
        for name in 's', 'stdin', 'stdout', 'stderr':
            self.assertEqual(self.tool('verify', str(self.snaps / name))
                             ['result']['problems'], [])

    def test_one_at_a_time(self):
        self.boot()
        process = self.slow()
        self.tool('create', str(self.snaps / 't'), '--qmp',
                  str(self.folder / 'other.qmp'), code=2)
        process.send_signal(signal.SIGTERM)
        self.end(process, 130)

    def test_another_migration(self):
        """It began after it was seen that there is none."""
        self.boot()
        process = self.start(
            'create', str(self.snaps / 's'), '--qmp', self.guest.socket,
            at='Create._snapshot 1 before stop')
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        self.guest.vm.cmd('migrate', uri=f'exec:cat >{self.folder}/theirs')
        process.send_signal(signal.SIGCONT)
        # That migration's capabilities cannot be changed back yet
        self.end(process, 3)
        self.assertEqual(self.guest.vm.cmd('query-migrate')['status'],
                         'pre-switchover')
        self.guest.vm.cmd('migrate-continue', state='pre-switchover')
        while self.guest.vm.cmd('query-migrate')['status'] != 'completed':
            time.sleep(0.05)
        self.delete('s', '--partial')
        self.assertEqual(self.settings()[0]['background-snapshot'], False)

    def test_part_of_file(self):
        """A merge would take the file's beginning for the disk's."""
        self.boot('-blockdev', 'raw,node-name=d2,offset=1048576,size=33554432,'
                  'file.driver=file,file.filename=two.raw',
                  '-device', 'virtio-blk-pci,drive=d2,id=two')
        self.assertIn('part of its file', self.create('s', code=2)['error'])

    def test_internal_undone(self):
        self.boot(*self.arguments[:4])
        self.create('s', '--disks', 'internal', '--uri',
                    'exec:exit 1', code=1)
        self.assertEqual(self.image('snapshot', '-U', '-l', 'one.qcow2'), '')

    def test_unmodified_qemu(self):
        if STOCK == QEMU:
            self.skipTest('QEMU_STOCK is not given')
        self.guest = Guest(self.folder, *self.arguments, binary=STOCK)
        self.addCleanup(self.guest.close)
        self.create('s', code=2)
