# SPDX-License-Identifier: GPL-2.0-or-later

"""
Arguments of QEMU, without QEMU.
"""

import json
import tempfile
import unittest

import case  # noqa: F401  (makes the package importable)
from snapshot import cmdline
from snapshot.errors import Refused


class CommandLines(unittest.TestCase):
    """Arguments of QEMU, without QEMU."""

    def put(self, *argv, file='/x/a,b', kind='qcow2'):
        line = cmdline.CommandLine(['qemu', *argv], '/x')
        line.place_of([file])('/new,1', kind)
        return line.argv[1:]

    def test_drive(self):
        self.assertEqual(
            self.put('-drive', 'if=virtio,file=a,,b,format=raw'),
            ['-drive', 'if=virtio,file=/new,,1,format=qcow2'])
        self.assertEqual(self.put('--drive', 'file.filename=/x/a,,b'),
                         ['--drive', 'file.filename=/new,,1'])
        self.assertEqual(self.put('-hda', 'a,b'), ['-hda', '/new,1'])

    def test_blockdev(self):
        self.assertEqual(
            self.put('-blockdev', 'file,node-name=f,filename=a,,b',
                     '-blockdev', 'driver=raw,node-name=d,file=f'),
            ['-blockdev', 'driver=file,node-name=f,filename=/new,,1',
             '-blockdev', 'driver=qcow2,node-name=d,file=f'])
        [_, text] = self.put('-blockdev', json.dumps({
            'driver': 'raw', 'file': {'driver': 'file', 'filename': 'a,b'}}))
        self.assertEqual(json.loads(text), {
            'driver': 'qcow2',
            'file': {'driver': 'file', 'filename': '/new,1'}})

    def test_refused(self):
        for argv in ((), ('-drive', 'file=c'), ('a,b',),
                     ('-drive', 'file=a,,b', '-hda', 'a,b'),
                     ('-drive', 'file=a,,b,backing.driver=raw'),
                     ('-blockdev', 'file,node-name=f,filename=a,,b'),
                     ('-blockdev', 'raw,offset=5,file.filename=a,,b')):
            with self.assertRaises(cmdline.Refused, msg=str(argv)):
                self.put(*argv)

    def test_drop(self):
        line = cmdline.CommandLine(
            ['qemu', '-S', '-qmp', 'stdio', '-m', '1G', '-chardev',
             'socket,id=m,path=/m', '--mon', 'chardev=m,mode=control',
             '-daemonize', '-serial', 'unix:/s,server=on'], '/')
        line.drop()
        self.assertEqual(line.argv, ['qemu', '-m', '1G', '-serial',
                                     'unix:/s,server=on'])
        self.assertEqual(line.sockets(), ['/s'])
        line = cmdline.CommandLine(
            ['qemu', '-chardev', 'socket,id=m,path=m', '-vnc', 'unix:v',
             '-chardev', 'socket,id=n,path=n,,m,server'], '/x')
        self.assertEqual(line.sockets(), ['/x/v', '/x/n,m'])

    def test_descriptors(self):
        for word in ('tap,fd=3', 'tap,vhostfds=4:5', '/dev/fdset/1'):
            with self.assertRaises(cmdline.Refused):
                cmdline.CommandLine(['qemu', '-netdev', word], '/').check()

    def test_shared_memory(self):
        """Two VMs must not have the same RAM."""
        def check(text, *given):
            cmdline.CommandLine(['qemu', '-object', text], '/').check(given)

        with tempfile.NamedTemporaryFile() as file:
            text = f'memory-backend-file,id=m,mem-path={file.name},size=1M'
            check(text)
            check(f'{text},share=off')
            check(f'{text},share=on,readonly=on')
            check(f'{text},share=on', f'{text},share=on')
            for shared in (f'{text},share=on', json.dumps({
                    'qom-type': 'memory-backend-file', 'id': 'm',
                    'mem-path': file.name, 'size': 1 << 20, 'share': True})):
                with self.assertRaises(Refused):
                    check(shared)
        check(f'{text},share=on')
