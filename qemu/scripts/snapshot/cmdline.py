# SPDX-License-Identifier: GPL-2.0-or-later

"""
Turns the command line of a VM that was snapshotted into one that restores it:
other files for its disks, no monitors.  It replaces what it finds exactly
where QEMU documents it to be, and refuses what it cannot find.
"""

import json
import os
import re
from functools import partial
from typing import Any, Callable, Collection, Dict, List, Optional, Tuple

from .blockjobs import same_file
from .errors import Refused


Json = Dict[str, Any]
Pairs = List[Tuple[str, str]]

# The value of these is the name of a disk's file, and nothing else
PLAIN = ('hda', 'hdb', 'hdc', 'hdd', 'fda', 'fdb', 'sd', 'pflash', 'mtdblock')
# What a restored VM cannot share with the one that was snapshotted, or what
# "restore" decides: option, whether it has a value
DROPPED = {'incoming': True, 'daemonize': False, 'pidfile': True, 'S': False,
           'qmp': True, 'qmp-pretty': True, 'monitor': True, 'loadvm': True,
           'mon': True}
# It would hold file descriptors that only its parent knows
INHERITED = re.compile(r'(^|[,.:])(fds?|vhostfds?|sock-?fd)=\d|/dev/fdset/')

TRUE = ('on', 'yes', 'true', 'y', '')
SOCKET = re.compile(r'(?:unix:|(?:^|[,.])path=)((?:[^,]|,,)+)')


def option(word: str) -> str:
    """The name of an option, which may begin with two dashes."""
    if not word.startswith('-') or word == '-':
        return ''
    return word[2:] if word.startswith('--') else word[1:]


def split(text: str) -> Pairs:
    """QemuOpts: k=v,k=v, with ,, for a comma."""
    pairs = []
    for part in re.findall(r'(?:[^,]|,,)+', text):
        key, equals, value = part.partition('=')
        pairs.append((key, value.replace(',,', ',') if equals else ''))
    return pairs


def join(pairs: Pairs) -> str:
    """The reverse."""
    return ','.join(key + '=' + value.replace(',', ',,') if value
                    else key for key, value in pairs)


def flatten(value: Any, prefix: str = '') -> Dict[str, Any]:
    """A tree of JSON as k.k=v."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: Dict[str, Any] = {}
    for key, child in value.items():
        flat.update(flatten(child, f'{prefix}.{key}' if prefix else key))
    return flat


class Argument:
    """The value of one -drive, -blockdev or such, which can be changed."""

    def __init__(self, argv: List[str], index: int, implied: str):
        self._argv = argv
        self._index = index
        text = argv[index]
        self.text = text
        self.is_json = text.startswith('{')
        if self.is_json:
            self._tree: Json = json.loads(text)
        else:
            pairs = split(text)
            if implied and pairs and '=' not in text.split(',')[0]:
                pairs[0] = (implied, pairs[0][0])
            self._pairs = pairs

    def get(self, key: str) -> Optional[str]:
        """A value; of several, QEMU takes the last."""
        if self.is_json:
            value = flatten(self._tree).get(key)
            return None if value is None else str(value)
        return dict(self._pairs).get(key)

    def has_prefix(self, prefix: str) -> bool:
        """Whether there is any key that begins with this."""
        keys = flatten(self._tree) if self.is_json else dict(self._pairs)
        return any(key.startswith(prefix) for key in keys)

    def set(self, key: str, value: str) -> None:
        """Change a value that is there."""
        if self.is_json:
            *path, last = key.split('.')
            tree = self._tree
            # {"a.b": 1} is allowed as well
            if key in tree:
                path, last = [], key
            for step in path:
                tree = tree[step]
            tree[last] = value
            self._argv[self._index] = json.dumps(self._tree)
        else:
            self._pairs = [(k, value if k == key else v)
                           for k, v in self._pairs]
            self._argv[self._index] = join(self._pairs)


class CommandLine:
    """A command line of QEMU."""

    def __init__(self, argv: List[str], cwd: str):
        self.argv = list(argv)
        self._cwd = cwd

    def _arguments(self, name: str, implied: str) -> List[Argument]:
        return [Argument(self.argv, index + 1, implied)
                for index, word in enumerate(self.argv[:-1])
                if option(word) == name]

    def _is(self, name: Optional[str], files: List[str]) -> bool:
        if not name:
            return False
        name = os.path.join(self._cwd, name)
        return any(same_file(name, file) for file in files)

    def place_of(self, files: List[str]) -> Callable[[str, str], None]:
        """Where a disk is named: a function that puts another file there.

        @files: all the names that it may have there.
        """
        found: List[Callable[[str, str], None]] = []
        for index, word in enumerate(self.argv[:-1]):
            if option(word) in PLAIN and self._is(self.argv[index + 1],
                                                  files):
                found.append(partial(self._set_plain, index + 1))
        for drive in self._arguments('drive', ''):
            for key in ('file', 'file.filename'):
                if self._is(drive.get(key), files):
                    found.append(partial(self._set_drive, drive, key))
        nodes = self._arguments('blockdev', 'driver')
        for node in nodes:
            for key in ('filename', 'file.filename'):
                if self._is(node.get(key), files):
                    found.append(partial(self._set_blockdev, nodes, node,
                                         key))
        if len(found) != 1:
            raise Refused(
                f'the command line names {files[-1]} in {len(found)} places '
                'that are understood (-drive, -blockdev, -hda and the like), '
                'not in one')
        return found[0]

    @staticmethod
    def _set_format(argument: Argument, key: str, new: str) -> None:
        if argument.has_prefix('backing'):
            raise Refused('the command line tells what backs a disk')
        if argument.get('offset') or argument.get('size'):
            raise Refused('a disk is only part of its file')
        if argument.get(key):
            argument.set(key, new)

    def _set_plain(self, index: int, new: str, _format: str) -> None:
        self.argv[index] = new

    def _set_drive(self, drive: Argument, key: str, new: str,
                   new_format: str) -> None:
        self._set_format(drive, 'format', new_format)
        self._set_format(drive, 'driver', new_format)
        drive.set(key, new)

    def _set_blockdev(self, nodes: List[Argument], node: Argument, key: str,
                      new: str, new_format: str) -> None:
        top = node
        if key == 'filename':
            # The format is in the one node that is above it
            users = [other for other in nodes
                     if other.get('file') == node.get('node-name')]
            if len(users) != 1:
                raise Refused(f'{len(users)} -blockdev refer to node '
                              f'{node.get("node-name")}, not one')
            top = users[0]
        if top.get('driver') not in ('raw', 'qcow2'):
            raise Refused(f'-blockdev {top.get("node-name")} has the driver '
                          f'{top.get("driver")}, not raw or qcow2')
        self._set_format(top, 'driver', new_format)
        node.set(key, new)

    def drop(self) -> List[str]:
        """Take out what cannot be used again; returns it."""
        kept, dropped = self.argv[:1], []
        words = iter(self.argv[1:])
        for word in words:
            has_value = DROPPED.get(option(word))
            if has_value is None:
                kept.append(word)
                continue
            dropped.append(word)
            if has_value:
                dropped.append(next(words, ''))
        self.argv = kept
        return dropped + self._drop_chardevs(dropped)

    def _drop_chardevs(self, dropped: List[str]) -> List[str]:
        """Character devices that only dropped monitors had."""
        also = []
        for index, word in enumerate(dropped):
            if option(word) != 'mon':
                continue
            name = Argument(dropped, index + 1, 'chardev').get('chardev')
            for place, other in enumerate(self.argv[:-1]):
                device = Argument(self.argv, place + 1, 'backend')
                if option(other) == 'chardev' and device.get('id') == name:
                    also += self.argv[place:place + 2]
                    del self.argv[place:place + 2]
                    break
        return also

    def sockets(self) -> List[str]:
        """Sockets of this host that QEMU would listen at."""
        found = []
        for before, word in zip(self.argv, self.argv[1:]):
            if option(before) == 'vnc' or re.search(
                    r',server(=on|=yes|=true|=y)?(,|$)', word):
                found += [os.path.join(self._cwd, path.replace(',,', ','))
                          for path in SOCKET.findall(word)]
        return found

    def check(self, given: Collection[str] = ()) -> None:
        """Refuse what works for nobody but the one who started the VM.

        @given: arguments that are not from that one
        """
        for memory in self._arguments('object', 'qom-type'):
            path = os.path.join(self._cwd, memory.get('mem-path') or '')
            if memory.get('qom-type') == 'memory-backend-file' and \
                    str(memory.get('share')).lower() in TRUE and \
                    str(memory.get('readonly')).lower() not in TRUE and \
                    os.path.isfile(path) and memory.text not in given:
                raise Refused(f'{path} is RAM of the VM that was snapshotted, '
                              'which would be overwritten: --replace '
                              f'{memory.text!r} by what has another file')
        for word in self.argv:
            if INHERITED.search(word):
                raise Refused(f'{word!r} in the command line is a file '
                              'descriptor of the program that had started '
                              'the VM')


def problems(manifest: Json) -> List[str]:
    """Why a command line could not be used to restore, if so."""
    command = manifest['command']
    if not command:
        return ['the command line of QEMU is not to be seen from here']
    line = CommandLine(command['argv'], command['cwd'])
    found = []
    try:
        line.check()
    except Refused as problem:
        found.append(str(problem))
    if manifest['disks']['mode'] == 'none':
        return found
    for disk in manifest['disks']['list']:
        try:
            line.place_of(disk['chain'])('/dev/null', 'qcow2')
        except Refused as problem:
            found.append(f'disk {disk["id"]}: {problem}')
    return found
