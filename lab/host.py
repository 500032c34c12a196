"""What the kernel of this machine can do, and settings of it for a while.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

MIB = 1 << 20
# In front of a command: it is killed when our thread that runs it ends.
DIE_WITH_US = ('setpriv', '--pdeathsig', 'KILL')
THP_ENABLED = Path('/sys/kernel/mm/transparent_hugepage/enabled')
HUGE_PAGES = Path('/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages')
HUGE_PAGE_MB = 2

# Bits of UFFDIO_API's features; see linux/userfaultfd.h.
UFFD_WRITE_PROTECT = 1 << 0
UFFD_SIGBUS = 1 << 7
UFFD_WRITE_PROTECT_SHARED = 1 << 12

SYS_USERFAULTFD = 323  # on x86_64
_USER_MODE_ONLY = 1
_IOC_NEW, _IOC_API = 0xaa00, 0xc018aa3f
_API_VERSION = 0xaa


class Skip(Exception):
    """A case cannot run here; says why"""


def needs_root(what: str) -> None:
    if os.geteuid() != 0:
        raise Skip(f'{what} needs root')


def userfaultfd_features(user_mode_only: bool) -> int:
    """What userfaultfd can do for a process like this one; 0: nothing.

    @user_mode_only: writes by the kernel need not be trapped.
    """
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    if user_mode_only:
        flags |= _USER_MODE_ONLY
    try:
        with open('/dev/userfaultfd', 'r+b', buffering=0) as device:
            fd = fcntl.ioctl(device, _IOC_NEW, flags)
    except OSError:
        fd = ctypes.CDLL(None).syscall(SYS_USERFAULTFD, flags)
    if fd < 0:
        return 0
    try:
        api = fcntl.ioctl(fd, _IOC_API, struct.pack('QQQ', _API_VERSION, 0, 0))
    finally:
        os.close(fd)
    return struct.unpack('QQQ', api)[1]


def change(stack: contextlib.ExitStack, setting: Path, value: str) -> None:
    """Give a file below /sys or /proc a value until @stack is left.

    Of files that list the possible values, [] are around the present one.
    """
    try:
        text = setting.read_text().strip()
    except OSError as problem:
        raise Skip(f'{setting} cannot be read: {problem}') from problem
    chosen = re.search(r'\[(.*)\]', text)
    old = chosen.group(1) if chosen else text
    if old == value:
        return
    needs_root(f'{value} in {setting}')
    try:
        setting.write_text(value)
    except OSError as problem:
        raise Skip(f'{setting} cannot be changed: {problem}') from problem
    stack.callback(setting.write_text, old)


def reserve_huge_pages(stack: contextlib.ExitStack, mib: int) -> None:
    """Have @mib MiB more in huge pages of 2 MiB until @stack is left."""
    if not HUGE_PAGES.exists():
        raise Skip('this kernel has no huge pages of 2 MiB')
    wanted = int(HUGE_PAGES.read_text()) + mib // HUGE_PAGE_MB
    change(stack, HUGE_PAGES, str(wanted))
    got = int(HUGE_PAGES.read_text())
    if got < wanted:
        raise Skip(f'the kernel gives {got} huge pages instead of {wanted}')


def mount_tmpfs(stack: contextlib.ExitStack, folder: Path,
                options: str) -> None:
    """Mount a tmpfs until @stack is left."""
    needs_root('mounting a tmpfs')
    folder.mkdir(exist_ok=True)
    try:
        subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'lab', folder],
                       check=True)
    except subprocess.CalledProcessError as problem:
        raise Skip('this root cannot mount a tmpfs') from problem
    # Lazy: it must not fail for what still has a file open there.
    stack.callback(subprocess.run, ['umount', '-l', folder])


def needs_room(folder: Path, mib: int) -> None:
    free = shutil.disk_usage(folder).free // MIB
    if free < mib:
        raise Skip(f'{folder} has {free} MiB free, {mib} are needed')


def needs_direct_io(folder: Path) -> None:
    """Linux 6.6 and newer let tmpfs have it."""
    file = folder / 'direct'
    try:
        os.close(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError as problem:
        raise Skip(f'no O_DIRECT in {folder}: {problem.strerror}'
                   ) from problem
    finally:
        file.unlink(missing_ok=True)


def needs_file_system(folder: Path, *, memory: bool) -> None:
    """A folder of a file system that is made of memory (tmpfs), or is not."""
    kind = subprocess.run(['stat', '-f', '-c', '%T', folder],
                          stdout=subprocess.PIPE, text=True,
                          check=True).stdout.strip()
    if (kind == 'tmpfs') != memory:
        raise Skip(f'{folder} is on {kind}')
