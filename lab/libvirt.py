"""libvirt: an ordinary user's daemon, run where it was built.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import contextlib
import grp
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, List, NamedTuple
from xml.etree import ElementTree

from . import env
from .host import DIE_WITH_US, Skip, needs_root
from .place import log_file
from .scene import Scene
from .steps import wait_until

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
# A domain to be defined only.
PROBE = f'''
<domain type='qemu'>
  <name>probe</name><memory>1024</memory>
  <os><type arch='x86_64'>hvm</type></os>
  <devices><emulator>{env.QEMU}</emulator></devices>
</domain>
'''


class VirshError(Exception):
    """What virsh says"""


class VirshTimeout(Exception):
    """It does not come back."""


class Notes(NamedTuple):
    """A daemon's files about a domain, by which the next one knows it."""
    status: str
    definition: str

    def sources(self) -> List[Path]:
        """The files that its disks are."""
        return [Path(source.attrib['file']) for source in
                ElementTree.fromstring(self.status).findall(
                    './domain/devices/disk/source')]


class Daemon:
    """A virtqemud, and all that it has started: they end with the scene.

    build: where it was built; settings: of its qemu.conf.
    Its files are in a folder of their own, with a short name: those of unix
    sockets are limited to 107 bytes.
    """
    uri = 'qemu:///session'
    # Below that folder.
    _conf, _state = '.config/libvirt/qemu.conf', 'run/libvirt/qemu/run'
    _definitions = '.config/libvirt/qemu'
    _qemu_logs = '.cache/libvirt/qemu/log'
    _capabilities = '.cache/libvirt/qemu/cache/capabilities'
    _folders = ('run', 'bin', '.config/libvirt', '.cache')

    def __init__(self, scene: Scene, build: Path, name: str = 'libvirt',
                 **settings: Any):
        self.build = build
        self._scene = scene
        self._log = scene.logs / f'{name}.log'
        self.home = Path(scene.enter_context(
            tempfile.TemporaryDirectory(prefix='lab')))
        self._held = self.home / 'bin/held'
        for folder in self._folders:
            (self.home / folder).mkdir(mode=0o700, parents=True)
        (self.home / 'bin/zstd').write_text(HELD_ZSTD)
        (self.home / 'bin/zstd').chmod(0o755)
        (self.home / 'bin/qemu-img').symlink_to(scene.place.qemu_img)
        # To ask a QEMU what it can takes seconds; libvirt checks whether what
        # it has noted is still true.
        self._noted = (env.LAB / 'capabilities' / type(self).__name__
                       / str(build).strip('/').replace('/', '-'))
        if self._noted.exists():
            shutil.copytree(self._noted, self.home / self._capabilities)
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
        return [*DIE_WITH_US, *user, *self._environment(),
                f'XDG_RUNTIME_DIR={self.home}/run', 'LIBVIRT_AUTOSTART=0',
                *map(str, command)]

    def _environment(self) -> List[str]:
        """A command that gives it to another."""
        path = ':'.join(map(str, (self.home / 'bin', '/usr/bin', '/bin',
                                  '/usr/sbin', '/sbin')))
        return ['env', '-i', f'HOME={self.home}', f'PATH={path}',
                'LANG=C.UTF-8', 'LIBVIRT_DIR_OVERRIDE=1',
                f'abs_top_builddir={self.build}',
                f'LD_LIBRARY_PATH={self.build}/src']

    def start(self, **settings: Any) -> None:
        """Start it, as it ends when it is told so; with new settings."""
        self.launch(**settings)
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(VirshError, VirshTimeout):
                self.virsh('list')
                return
            if (self._process.poll() is not None
                    or time.monotonic() > deadline):
                last = self._log.read_text(errors='replace').splitlines()[-1:]
                raise RuntimeError(f'libvirt does not start: {last}')
            time.sleep(0.1)

    def launch(self, **settings: Any) -> None:
        """The same, without waiting until it can be talked to."""
        lines = {'security_driver': 'none', 'stdio_handler': 'file',
                 **settings}
        (self.home / self._conf).write_text(''.join(
            f'{key} = {value}\n' if isinstance(value, int) else
            f'{key} = "{value}"\n' for key, value in lines.items()))
        with self._log.open('ab') as log:
            self._process = subprocess.Popen(
                self.command('LIBVIRT_LOG_OUTPUTS=2:stderr',
                             self.build / 'src/virtqemud'), cwd='/',
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def start_storage(self) -> None:
        """A daemon for pools, which goes on until the scene ends."""
        with self._log.open('ab') as log:
            process = subprocess.Popen(
                self.command(self.build / 'src/virtstoraged'), cwd='/',
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._scene.callback(process.wait)
        self._scene.callback(process.kill)
        wait_until('pools are looked after', (
            self.home / 'run/libvirt/virtstoraged-sock').exists)

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
                for file in (self.home / self._state).glob('*.pid')
                if file.stem != 'driver']

    def notes(self, domain: str) -> 'Notes':
        """Those of a domain that runs."""
        return Notes(*(
            (self.home / folder / f'{domain}.xml').read_text()
            for folder in (self._state, self._definitions)))

    def set_notes(self, domain: str, notes: 'Notes') -> None:
        for folder, text in zip((self._state, self._definitions), notes):
            (self.home / folder / f'{domain}.xml').write_text(text)

    def qemu_log(self, domain: str) -> str:
        """QEMU's last words."""
        log = self.home / self._qemu_logs / f'{domain}.log'
        return ' | '.join(log.read_text().splitlines()[-5:])

    def _end(self) -> None:
        self.full_speed()
        self.kill()
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + START_S
            while (Path(f'/proc/{pid}').exists()
                   and time.monotonic() < deadline):
                time.sleep(0.05)
        if (self.home / self._capabilities).exists():
            shutil.copytree(self.home / self._capabilities, self._noted,
                            dirs_exist_ok=True)
        for log in (self.home / self._qemu_logs).glob('*.log'):
            shutil.copy(log, log_file(self._log.with_suffix(''), log.stem))


class SystemDaemon(Daemon):
    """That of the whole machine, root's; its QEMUs are another user's.

    /run, and its /etc and /var, which are below where it was to be installed,
    are in its mount namespace folders like those of an ordinary user's daemon.
    """
    uri = 'qemu:///system'
    _conf, _state = 'etc/libvirt/qemu.conf', 'run/libvirt/qemu'
    _definitions = 'etc/libvirt/qemu'
    _qemu_logs = 'var/log/libvirt/qemu'
    _capabilities = 'var/cache/libvirt/qemu/capabilities'
    _folders = ('bin', 'run', 'etc/libvirt', 'var')

    def __init__(self, scene: Scene, build: Path, **settings: Any):
        needs_root('a daemon of the whole machine')
        self._root = build.parent / 'root'
        for folder in ('etc', 'var'):
            (self._root / folder).mkdir(parents=True, exist_ok=True)
        super().__init__(scene, build, user=USER, group=grp.getgrgid(
            pwd.getpwnam(USER).pw_gid).gr_name, **settings)

    def give(self, *paths: Path) -> None:
        """libvirt does that itself; QEMU has to get at them."""
        for folder in (self.home, self.home / 'run', self.home / 'var'):
            folder.chmod(0o755)

    def command(self, *command: Any) -> List[str]:
        script = ' && '.join(
            [f'mount --bind {self.home}/{folder} {place}' for folder, place in (
                ('etc', self._root / 'etc'), ('var', self._root / 'var'),
                ('run', '/run'))] +
            # Not all of libvirt looks for /run in the same place.
            [f'ln -sfn /run {self._root}/var/run',
             # An ordinary user's cannot open it either.
             f'{{ [ -e {self.home}/kvm ] || mknod -m 600 {self.home}/kvm '
             'c 1 3; }',
             f'{{ [ ! -e /dev/kvm ] || mount --bind {self.home}/kvm '
             '/dev/kvm; }',
             'exec "$@"'])
        return [*DIE_WITH_US, 'unshare', '--mount', 'sh', '-c', script, 'sh',
                *self._environment(), *map(str, command)]


class Virsh:
    """A virsh that runs."""

    def __init__(self, daemon: Daemon, *arguments: Any):
        self._what = arguments[0]
        self._process = subprocess.Popen(
            daemon.command(daemon.build / 'tools/virsh', '-q', '-c',
                           daemon.uri, *arguments), cwd='/',
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True)

    def goes_on(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def finish(self, timeout: float = COMMAND_S) -> str:
        """What it has printed; raises VirshError or VirshTimeout."""
        try:
            output, error = self._process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise VirshTimeout(
                f'{self._what}: nothing within {timeout:.0f} s') from None
        if self._process.returncode:
            raise VirshError(f'{self._what}: {error.strip()}')
        return output.strip()


class _Watch:
    """The output of a virsh that tells of events until the scene ends."""

    def __init__(self, scene: Scene, daemon: Daemon, *command: str):
        self._file = scene.logs / f'events{time.monotonic_ns()}.log'
        with self._file.open('wb') as out:
            process = subprocess.Popen(
                daemon.command('stdbuf', '-oL', daemon.build / 'tools/virsh',
                               '-c', daemon.uri, *command), cwd='/',
                stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        scene.callback(process.wait)
        scene.callback(process.kill)

    def _find(self, pattern: str) -> List[str]:
        return re.findall(pattern, self._file.read_text(), re.M)


class Events(_Watch):
    """All lifecycle events of the domain @name, until the daemon ends."""

    def __init__(self, scene: Scene, daemon: Daemon, name: str):
        super().__init__(scene, daemon, 'event', '--all', '--loop')
        self._name = name
        # virsh does not say from when on it gets them.
        definition = scene.logs / 'probe.xml'
        definition.write_text(PROBE)
        deadline = time.monotonic() + START_S
        while not self._of('probe'):
            if time.monotonic() > deadline:
                raise RuntimeError('virsh shows no events')
            daemon.virsh('define', definition)
            daemon.virsh('undefine', 'probe')

    def _of(self, name: str) -> List[str]:
        return self._find(rf"event 'lifecycle' for domain '{name}': (\w+)")

    def lifecycle(self) -> List[str]:
        """Words like 'Suspended'."""
        return self._of(self._name)


class Stops(_Watch):
    """QEMU's own events of a domain that stops and runs again."""

    def __init__(self, scene: Scene, daemon: Daemon, name: str):
        super().__init__(scene, daemon, 'qemu-monitor-event', name, '--loop',
                         '--regex', '--event', '^(STOP|RESUME)$')

    def last(self) -> float:
        """Seconds that it last stood still, by QEMU's clock."""
        deadline = time.monotonic() + START_S
        while True:
            stops, resumes = (self._find(rf'^event {what} at (\S+) for')
                              for what in ('STOP', 'RESUME'))
            if stops and len(stops) == len(resumes):
                return float(resumes[-1]) - float(stops[-1])
            if time.monotonic() > deadline:
                raise RuntimeError(f'{len(stops)} times stopped, '
                                   f'{len(resumes)} times resumed')
            time.sleep(0.1)
