"""What cases with libvirt do in common: snapshots by virsh, what they expect.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import os
import re
import signal
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Type

from . import disk, env
from .domain import NAME, TARGETS, Domain
from .libvirt import Daemon, Virsh, VirshError
from .scene import Scene
from .steps import expect, refused, wait_until
from .workload import SelfCheck

# What the guest writes while an image is held has room in it.
HOLDABLE: Dict[str, Any] = {
    'snapshot_image_format': 'zstd', 'snapshot_memory_buffer_size': 320}
ABORT_S, UNDO_S = 60, 60
# What a snapshot says that was aborted.
ABORTED = 'canceled by client'
# Where none of the workloads is.
MARKER, MARKER_MB = 'written during the snapshot', 40
# What else says that waits for the domain meanwhile.
BUSY = 'cannot acquire state change lock'


def start(scene: Scene, emulator: Path = env.QEMU,
          kind: Type[Daemon] = Daemon, **settings: Any) -> Domain:
    """A domain of our libvirt's, which is busy."""
    scene.check = SelfCheck(write_mb=64, static_mb=16, pause_us=500)
    daemon = kind(scene, env.LIBVIRT, **settings)
    domain = Domain(scene, daemon, emulator)
    domain.boot()
    return domain


def arguments(scene: Scene, name: str, *more: str,
              image: Optional[Path] = None) -> List[str]:
    """Of a snapshot of all that there is; @more may say else of its disks."""
    command = ['snapshot-create-as', NAME, name, *more, '--memspec',
               f'file={image or scene.image(name)},snapshot=external']
    for target in TARGETS:
        if not any(word.startswith(f'{target},') for word in more):
            command += ['--diskspec', f'{target},snapshot=external,'
                        f'file={scene.files}/{target}.{name}']
    return command


def processed(domain: Domain) -> int:
    """Bytes that are saved, by the information about the domain's job."""
    found = re.search(r'data_processed: (\d+)',
                      domain.virsh('domjobinfo', '--rawstats'))
    return int(found.group(1)) if found else 0


def begin_early(scene: Scene, domain: Domain, name: str, *more: str) -> Virsh:
    """A held snapshot of which there are the daemon's notes, maybe no more."""
    domain.daemon.hold()
    begun = domain.daemon.begin(*arguments(scene, name, *more))
    deadline = time.monotonic() + 30
    while '<backgroundSnapshot' not in domain.daemon.notes(NAME).status:
        if not begun.goes_on():
            raise AssertionError(f'not begun: {begun.finish() or "ended"}')
        if time.monotonic() > deadline:
            raise AssertionError('not begun within 30 s')
        time.sleep(0.001)
    return begun


def begin_held(scene: Scene, domain: Domain, name: str, *more: str) -> Virsh:
    """A snapshot that makes little progress before daemon.full_speed()."""
    domain.daemon.hold()
    begun = domain.daemon.begin(*arguments(scene, name, *more))
    try:
        wait_until('memory is being saved', lambda:
                   processed(domain) > 0 or not begun.goes_on())
        if not begun.goes_on():
            raise AssertionError(f'not held: {begun.finish() or "ended"}')
    except BaseException:
        domain.daemon.full_speed()
        raise
    return begun


def begin_background(scene: Scene, domain: Domain, name: str,
                     *more: str) -> Virsh:
    """The same, and the guest goes on."""
    begun = begin_held(scene, domain, name, *more)
    wait_until('the domain runs', lambda: domain.state() == 'running')
    scene.check.moves(domain)
    return begun


def kill_daemon(domain: Domain, begun: Virsh) -> None:
    """In the middle of a snapshot, of which virsh then tells nothing good."""
    domain.daemon.kill()
    refused('a snapshot without its daemon', '', begun.finish, VirshError)


def kill_qemu(domain: Domain, begun: Virsh) -> None:
    """The same; the daemon may have ended before."""
    [pid] = domain.daemon.pids()
    os.kill(pid, signal.SIGKILL)
    refused('a snapshot without its QEMU', '', begun.finish, VirshError)


def in_guest(domain: Domain, command: str) -> None:
    """Have its shell run a command, and wait until that has ended."""
    mark = domain.console.mark()
    domain.console.run(f'{command}; echo has-ended')
    domain.console.wait('^has-ended', mark, 30)


def write_marker(domain: Domain) -> None:
    """To the second disk."""
    in_guest(domain, f'echo "{MARKER}" | dd of=/dev/vdb bs=1M conv=fsync '
             f'seek={MARKER_MB} 2>/dev/null')


def expect_marker(path: Path) -> None:
    expect('the disk', disk.contents(path, MARKER_MB, len(MARKER)),
           MARKER.encode())


def power_off(domain: Domain) -> None:
    """By the guest, once nobody there uses its disks any more."""
    domain.console.run(
        'killall selfcheck; i=0; while [ $i -lt 100 ] && killall -q diskcheck;'
        ' do i=$((i+1)); sleep 0.1; done; sleep 1; poweroff -f')


class Before:
    """What a snapshot that fails must leave as it is."""

    def __init__(self, scene: Scene, domain: Domain):
        self._scene = scene
        self._domain = domain
        self._state = self._look()

    def _look(self) -> Dict[str, Any]:
        active = self._domain.state() != 'shut off'
        return {
            'definition': self._domain.virsh('dumpxml', '--inactive'),
            'domain': self._domain.virsh('dumpxml') if active else '',
            'snapshots': self._domain.virsh('snapshot-list', '--name'),
            'files': sorted(p.name for p in self._scene.files.iterdir())}

    def expect(self, shut_off: bool = False, within: float = 0) -> None:
        """As before; but for the domain itself if it was @shut_off.

        It may take the daemon some seconds.
        """
        expected = {**self._state, **({'domain': ''} if shut_off else {})}
        deadline = time.monotonic() + within
        while True:
            after = self._look()
            changed = [what for what in expected
                       if after[what] != expected[what]]
            if not changed:
                return
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
        for what in changed:
            (self._scene.logs / f'{what}.before').write_text(
                str(expected[what]))
            (self._scene.logs / f'{what}.after').write_text(str(after[what]))
        raise AssertionError(f'changed: {", ".join(changed)}: see *.before '
                             f'and *.after in {self._scene.logs}')

    def expect_shut_off(self) -> None:
        """The domain ends, and its snapshot is undone then."""
        wait_until('it is shut off',
                   lambda: self._domain.state() == 'shut off')
        self.expect(shut_off=True, within=UNDO_S)


def good(scene: Scene, domain: Domain, name: str) -> None:
    """A snapshot that nothing is in the way of; the domain is reverted."""
    domain.daemon.full_speed()
    domain.daemon.virsh(*arguments(scene, name))
    revert(domain, name)


def revert(domain: Domain, name: str) -> None:
    domain.virsh('snapshot-revert', name)
    domain.connect()
    domain.prove()
