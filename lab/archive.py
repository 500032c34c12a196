"""A cpio archive, which the kernel takes as initramfs.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

PROGRAM = 0o755


class Archive:
    """Files for a guest; names in it are absolute paths there.

    /dev/console, which init has from the start, is part of each kernel.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()

    def directory(self, name: str) -> None:
        self._inside(name).mkdir(parents=True, exist_ok=True)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        path = self._inside(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(mode)

    def copy(self, path: Path, name: str = '') -> None:
        """A file of this machine, by default under the same name."""
        self.directory(str(Path(name or path).parent))
        shutil.copy(path, self._inside(name or str(path)))

    def program(self, path: Path, name: str) -> None:
        """A program without its debug information, and its libraries."""
        self.copy(path, name)
        subprocess.run(['strip', '--strip-debug', self._inside(name)],
                       check=True)
        needed = subprocess.run(['ldd', path], stdout=subprocess.PIPE,
                                text=True)
        for library in re.findall(r'(?:=> |^\s*)(/\S+) \(', needed.stdout,
                                  re.M):
            self.copy(Path(library))

    def bytes(self) -> bytes:
        folder = Path(self._folder.name)
        names = '\n'.join(str(path.relative_to(folder))
                          for path in sorted(folder.rglob('*')))
        return subprocess.run(
            ['busybox', 'cpio', '-o', '-H', 'newc', '-R', '0:0'],
            input=names.encode(), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, check=True, cwd=folder).stdout

    def _inside(self, name: str) -> Path:
        return Path(self._folder.name + name)
