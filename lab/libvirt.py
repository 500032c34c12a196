"""libvirt: an ordinary user's daemon, run where it was built.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import contextlib
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, List

from .host import DIE_WITH_US, Skip
from .place import log_file
from .scene import Scene

USER = 'nobody'
START_S, COMMAND_S = 60, 120
# zstd; as long as it is held, it compresses little in a second.
HELD_ZSTD = '''#!/bin/sh
case $* in *d*) exec /usr/bin/zstd "$@" ;; esac
here=$(dirname "$0")
{
    while [ -e "$here/held" ]; do
        head -c 100000 >"$here/$$"
        [ -s "$here/$$" ] || exit
        cat "$here/$$"
        sleep 0.1
    done
    cat
} | exec /usr/bin/zstd "$@"
'''


class VirshError(Exception):
    """What virsh says, or that it does not come back"""


class Daemon:
    """A virtqemud, and all that it has started: they end with the scene.

    build: where it was built; settings: of its qemu.conf.
    Its files are in a folder of their own, with a short name: those of unix
    sockets are limited to 107 bytes.
    """

    def __init__(self, scene: Scene, build: Path, name: str = 'libvirt',
                 **settings: Any):
        self.build = build
        self._scene = scene
        self._log = scene.logs / f'{name}.log'
        self.home = Path(scene.enter_context(
            tempfile.TemporaryDirectory(prefix='lab')))
        self._run = self.home / 'run'
        self._held = self.home / 'bin/held'
        for folder in ('run', 'bin', '.config/libvirt', '.cache'):
            (self.home / folder).mkdir(mode=0o700, parents=True)
        (self.home / 'bin/zstd').write_text(HELD_ZSTD)
        (self.home / 'bin/zstd').chmod(0o755)
        (self.home / 'bin/qemu-img').symlink_to(scene.place.qemu_img)
        self.give(self.home, *self.home.rglob('*'), scene.files)
        if subprocess.run(self.command('test', '-x', build)).returncode:
            raise Skip(f'{USER} cannot get at {build}')
        scene.callback(self._end)
        self.start(**settings)

    def give(self, *paths: Path) -> None:
        """Have files belong to the daemon's user."""
        if os.geteuid() == 0:
            for path in paths:
                shutil.chown(path, USER, pwd.getpwnam(USER).pw_gid)

    def command(self, *command: Any) -> List[str]:
        """@command as the daemon's user, with its environment."""
        user = ['--reuid', USER, '--regid', str(pwd.getpwnam(USER).pw_gid),
                '--clear-groups'] if os.geteuid() == 0 else []
        path = ':'.join(map(str, (self.home / 'bin', '/usr/bin', '/bin',
                                  '/usr/sbin', '/sbin')))
        return [*DIE_WITH_US, *user, 'env', '-i', f'HOME={self.home}',
                f'XDG_RUNTIME_DIR={self._run}', f'PATH={path}',
                'LANG=C.UTF-8', 'LIBVIRT_DIR_OVERRIDE=1',
                'LIBVIRT_AUTOSTART=0', f'abs_top_builddir={self.build}',
                f'LD_LIBRARY_PATH={self.build}/src', *map(str, command)]

    def start(self, **settings: Any) -> None:
        """Start it, as it ends when it is told so; with new settings."""
        lines = {'security_driver': 'none', 'stdio_handler': 'file',
                 **settings}
        conf = self.home / '.config/libvirt/qemu.conf'
        conf.write_text(''.join(
            f'{key} = {value}\n' if isinstance(value, int) else
            f'{key} = "{value}"\n' for key, value in lines.items()))
        with self._log.open('ab') as log:
            self._process = subprocess.Popen(
                self.command('LIBVIRT_LOG_OUTPUTS=2:stderr',
                             self.build / 'src/virtqemud'), cwd='/',
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(VirshError):
                self.virsh('list')
                return
            if (self._process.poll() is not None
                    or time.monotonic() > deadline):
                last = self._log.read_text(errors='replace').splitlines()[-1:]
                raise RuntimeError(f'libvirt does not start: {last}')
            time.sleep(0.1)

    def kill(self) -> None:
        """Domains live on."""
        self._process.kill()
        self._process.wait()

    def restart(self, **settings: Any) -> None:
        """With other settings; nothing else is known to be going on."""
        self._process.terminate()
        self._process.wait(START_S)
        self.start(**settings)

    def virsh(self, *arguments: Any, timeout: float = COMMAND_S) -> str:
        """What virsh prints; raises VirshError."""
        return self.begin(*arguments).finish(timeout)

    def begin(self, *arguments: Any) -> 'Virsh':
        return Virsh(self, *arguments)

    def hold(self) -> None:
        """From now on, images in zstd's format make little progress."""
        self._held.touch()

    def full_speed(self) -> None:
        self._held.unlink(missing_ok=True)

    def pids(self) -> List[int]:
        """Of the domains' QEMUs."""
        return [int(file.read_text())
                for file in (self._run / 'libvirt/qemu/run').glob('*.pid')
                if file.stem != 'driver']

    def qemu_log(self, domain: str) -> str:
        """QEMU's last words."""
        log = self.home / f'.cache/libvirt/qemu/log/{domain}.log'
        return ' | '.join(log.read_text().splitlines()[-5:])

    def _end(self) -> None:
        self.kill()
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for log in (self.home / '.cache/libvirt/qemu/log').glob('*.log'):
            shutil.copy(log, log_file(self._log.with_suffix(''), log.stem))


class Virsh:
    """A virsh that runs."""

    def __init__(self, daemon: Daemon, *arguments: Any):
        self._what = arguments[0]
        self._process = subprocess.Popen(
            daemon.command(daemon.build / 'tools/virsh', '-q', '-c',
                           'qemu:///session', *arguments), cwd='/',
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True)

    def goes_on(self) -> bool:
        return self._process.poll() is None

    def finish(self, timeout: float = COMMAND_S) -> str:
        try:
            output, error = self._process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            raise VirshError(f'{self._what}: nothing within {timeout:.0f} s'
                             ) from None
        if self._process.returncode:
            raise VirshError(f'{self._what}: {error.strip()}')
        return output.strip()


class Events:
    """All lifecycle events of domains, until the daemon ends.

    Of the first second, some may be missed.
    """

    def __init__(self, scene: Scene, daemon: Daemon):
        self._file = scene.logs / f'events{time.monotonic_ns()}.log'
        with self._file.open('wb') as out:
            process = subprocess.Popen(
                daemon.command('stdbuf', '-oL', daemon.build / 'tools/virsh',
                               '-c', 'qemu:///session', 'event', '--all',
                               '--loop', '--timestamp'),
                cwd='/', stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        scene.callback(process.wait)
        scene.callback(process.kill)

    def lifecycle(self) -> List[str]:
        """Words like 'Suspended'."""
        return re.findall(r"event 'lifecycle' for domain '\S+': (\w+)",
                          self._file.read_text())
