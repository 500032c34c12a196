"""A cpio archive in the "newc" format, which the kernel takes as initramfs.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import re
import subprocess
import tempfile
from pathlib import Path
from typing import List, Set

DIRECTORY = 0o040755
PROGRAM = 0o100755
PLAIN = 0o100644
CONSOLE = 0o020600


class Archive:
    """Files for a guest; names in it are absolute paths there."""

    def __init__(self) -> None:
        self._parts: List[bytes] = []
        self._names: Set[str] = set()
        # The kernel opens it for init before there is a devtmpfs.
        self.directory('/dev')
        self._entry('/dev/console', CONSOLE, device=(5, 1))

    def directory(self, name: str) -> None:
        self._entry(name, DIRECTORY)

    def file(self, name: str, data: bytes, mode: int = PLAIN) -> None:
        """A file; the directories above it are made."""
        for parent in reversed(Path(name).parents[:-1]):
            self.directory(str(parent))
        self._entry(name, mode, data)

    def copy(self, path: Path, name: str = '') -> None:
        """A file of this machine, by default under the same name."""
        mode = PROGRAM if path.stat().st_mode & 0o100 else PLAIN
        self.file(name or str(path), path.read_bytes(), mode)

    def program(self, path: Path, name: str) -> None:
        """A program without its debug information, and its libraries."""
        with tempfile.NamedTemporaryFile() as stripped:
            subprocess.run(['strip', '--strip-debug', '-o', stripped.name,
                            path], check=True)
            self.file(name, Path(stripped.name).read_bytes(), PROGRAM)
        needed = subprocess.run(['ldd', path], stdout=subprocess.PIPE,
                                text=True)
        for library in re.findall(r'(?:=> |^\s*)(/\S+) \(', needed.stdout,
                                  re.M):
            self.copy(Path(library))

    def bytes(self) -> bytes:
        return b''.join(self._parts) + self._member('TRAILER!!!', 0)

    def _entry(self, name: str, mode: int, data: bytes = b'',
               device=(0, 0)) -> None:
        if name not in self._names:
            self._names.add(name)
            self._parts.append(self._member(name.lstrip('/'), mode, data,
                                            device))

    def _member(self, name: str, mode: int, data: bytes = b'',
                device=(0, 0)) -> bytes:
        fields = (len(self._parts), mode, 0, 0, 1, 0, len(data), 0, 0,
                  *device, len(name) + 1, 0)
        head = b'070701' + b''.join(b'%08X' % f for f in fields)
        head += name.encode() + b'\0'
        return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
