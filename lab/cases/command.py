"""scripts/qemu-snapshot, with a guest that runs and checks itself.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .. import env
from ..console import Console
from ..hardware import Hardware
from ..place import HERE, lines
from ..scene import Case, Scene
from ..steps import expect, expect_active, wait_until
from ..vm import VM, kernel_trouble

PROGRAM = env.BUILD / 'src' / 'scripts' / 'qemu-snapshot'
# So slow that it can be interrupted.
SLOW = '4M'
COMMAND_S = 120


def _start(*words: Any) -> 'subprocess.Popen[str]':
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), words[0], '--json', '--qemu-img',
         str(env.qemu_img(env.QEMU)), *map(str, words[1:])],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _end(process: 'subprocess.Popen[str]', code: int = 0) -> Any:
    out, said = process.communicate(timeout=COMMAND_S)
    if process.returncode != code:
        raise AssertionError(f'qemu-snapshot: {process.returncode} instead of '
                             f'{code}: {said or out}')
    return json.loads(out).get('result')


def _disk(vm: VM) -> str:
    """The file that the guest's disk is written to."""
    [drive] = vm.qmp.cmd('query-block')
    return Path(drive['inserted']['file']).name


def _restore(scene: Scene, hardware: Hardware, snap: Path) -> None:
    """The unmodified QEMU goes on from it, with a clean guest."""
    log, line = scene.logs / 'restored.kernel.log', scene.files / 'line'
    command = [str(env.STOCK), *hardware.arguments(), *lines(
        f'file,path={log}', f'socket,path={line},server=on,wait=off',
        'null')]
    result = _end(_start('restore', snap, '--qmp', scene.files / 'r.qmp',
                         '--command', '--', *command))
    with contextlib.ExitStack() as stack:
        stack.callback(os.kill, result['pid'], signal.SIGKILL)
        sock = stack.enter_context(socket.socket(socket.AF_UNIX))
        sock.connect(str(line))
        console = Console(sock, scene.logs / 'restored.lines.log')
        stack.callback(console.close)
        vm: Any = SimpleNamespace(console=console, place=HERE)
        scene.check.prove(vm)
        scene.disk_check.prove(vm)
        trouble = kernel_trouble(log)
        if trouble:
            raise AssertionError(f'restored kernel: {trouble[0]}')
    for path in result['disks']:
        os.unlink(path)


def command(scene: Scene) -> None:
    """Interrupted, then taken, restored, and deleted while it runs."""
    qmp, snap = scene.files / 'vm.qmp', scene.files / 'snap'
    vm = scene.boot(Hardware(vcpus=2, disk=scene.new_disk()),
                    '-qmp', f'unix:{qmp},server=on,wait=off')
    before = _disk(vm)
    process = _start('create', snap, '--qmp', qmp, '--max-bandwidth', SLOW)
    wait_until('RAM is being saved', lambda: process.poll() is not None
               or vm.qmp.cmd('query-migrate').get('ram', {}).get(
                   'transferred', 0) > 1 << 20, COMMAND_S)
    expect_active(vm, 'interrupted')
    process.send_signal(signal.SIGINT)
    _end(process, 130)
    vm.expect_status('running')
    scene.prove(vm)
    expect('disk', _disk(vm), before)
    expect('files', list(scene.files.glob('*snap*')), [])

    _end(_start('create', snap, '--qmp', qmp))
    vm.expect_status('running')
    scene.prove(vm)
    expect('problems', _end(_start('verify', snap))['problems'], [])
    # Both guests at once would only make each other slow.
    vm.qmp.cmd('stop')
    _restore(scene, vm.hardware, snap)
    vm.qmp.cmd('cont')
    _end(_start('delete', snap, '--qmp', qmp))
    scene.prove(vm)
    expect('disk', _disk(vm), before)


CASES = [Case('command', command)]
