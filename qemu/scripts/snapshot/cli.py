# SPDX-License-Identifier: GPL-2.0-or-later

"""
Arguments, and the end of the program: one result on stdout, one exit code.
"""

import argparse
import json
import os
import sys
import traceback
from typing import Any, Callable, Dict, List, Optional

from . import create, delete, disks, restore, show, texts, verify
from .errors import NotUndone, Refused, SnapshotError
from .progress import Progress, say


Json = Dict[str, Any]


def number_of_bytes(text: str) -> int:
    """A size with an optional suffix, as QEMU has it."""
    units = {'K': 10, 'M': 20, 'G': 30, 'T': 40}
    digits, shift = text, 0
    if text and text[-1].upper() in units:
        digits, shift = text[:-1], units[text[-1].upper()]
    if not digits.isdigit():
        raise argparse.ArgumentTypeError(
            f'{text!r} is no size: a number, perhaps with K, M, G or T')
    return int(digits) << shift


def channels(text: str) -> int:
    """What multifd-channels takes, or 0."""
    if not text.isdigit() or int(text) > 255:
        raise argparse.ArgumentTypeError('0 to 255')
    return int(text)


class Parser:
    """The arguments of all commands."""

    def __init__(self) -> None:
        self._parser = argparse.ArgumentParser(
            prog='qemu-snapshot', description=texts.ABOUT, epilog=texts.MORE,
            formatter_class=argparse.RawDescriptionHelpFormatter)
        self._commands = self._parser.add_subparsers(
            dest='name', metavar='COMMAND', required=True)
        self._create()
        self._restore()
        one = self._command('list', 'name the snapshots in a directory', '')
        one.add_argument('directory', metavar='DIR')
        one = self._command('verify', 'check a snapshot', texts.VERIFY, '')
        self._snapshot(one)
        one.add_argument('--quick', action='store_true',
                         help='do not read the contents of the image')
        one = self._command('delete', 'delete a snapshot', texts.DELETE, '')
        self._snapshot(one)
        self._qmp(one, False, 'socket of the VM that uses the overlays')
        one.add_argument('--partial', action='store_true',
                         help='undo a "create" that was killed')
        one.add_argument('--vm-off', action='store_true', help='with '
                         '--partial: its VM has ended, though that cannot be '
                         'seen from here')
        one.add_argument('--restored-gone', action='store_true', help='VMs '
                         'that were restored, and whose overlays are not to '
                         'be seen, have been removed with them')
        one.add_argument('--forget', action='store_true', help='leave all '
                         'disks and overlays as they are')

    def parse(self, words: Optional[List[str]]) -> argparse.Namespace:
        """Arguments after -- are restore's."""
        words = sys.argv[1:] if words is None else words
        after: List[str] = []
        if '--' in words:
            cut = words.index('--')
            words, after = words[:cut], words[cut + 1:]
        options = self._parser.parse_args(words)
        options.arguments = after
        if after and options.name != 'restore':
            self._parser.error(f'{options.name} takes nothing after --')
        if options.name == 'create':
            self._check_create(options)
        if options.name == 'delete' and options.vm_off and (
                options.qmp or not options.partial):
            self._parser.error('--vm-off is for --partial without --qmp')
        if options.name == 'delete' and options.restored_gone and \
                options.partial:
            self._parser.error('--restored-gone is not for --partial: nothing '
                               'is restored from such a snapshot')
        return options

    def _command(self, name: str, what: str, description: str,
                 epilog: str = '') -> argparse.ArgumentParser:
        parser = self._commands.add_parser(
            name, help=what, description=description or what, epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument('--json', action='store_true',
                            help='print the result as one JSON object')
        parser.add_argument('-v', '--verbose', action='store_true',
                            help='tell each step')
        parser.add_argument('--progress', action='store_true', default=None,
                            help='show progress even if stderr is no terminal')
        parser.add_argument('--no-progress', action='store_false',
                            dest='progress', help='never show it')
        parser.add_argument('--qemu-img', metavar='PROGRAM',
                            help='by default, the one beside QEMU or in PATH')
        return parser

    @staticmethod
    def _snapshot(parser: argparse.ArgumentParser) -> None:
        parser.add_argument('snapshot', metavar='DIR/NAME')

    @staticmethod
    def _qmp(parser: argparse.ArgumentParser, required: bool,
             text: str) -> None:
        parser.add_argument('--qmp', metavar='SOCKET', required=required,
                            help=text)

    def _create(self) -> None:
        one = self._command('create', 'snapshot a running VM', texts.CREATE,
                            texts.CREATE_MORE)
        self._snapshot(one)
        self._qmp(one, True, "the VM's QMP socket, or HOST:PORT")
        group = one.add_argument_group('disks')
        group.add_argument('--disks', choices=disks.MODES, default='external',
                           help='external: overlays (default); internal: in '
                           'the qcow2 files themselves; none: snapshot them '
                           'by other means while the VM is paused')
        group.add_argument('--overlay-dir', metavar='DIR', help='where the '
                           'overlays go, by default beside the disks')
        group = one.add_argument_group('image')
        group.add_argument('--format', choices=('stream', 'mapped-ram'),
                           default='stream', help='mapped-ram: each page has '
                           'its place in the file')
        group.add_argument('--channels', type=channels, metavar='N',
                           default=0, help='write it with N threads '
                           '(multifd; mapped-ram only)')
        group.add_argument('--direct-io', action='store_true', help='write '
                           'past the page cache (mapped-ram only)')
        group.add_argument('--uri', metavar='URI', help='migrate to any URI, '
                           'such as "exec:ssh host cat >image", instead of a '
                           'file in the snapshot')
        group.add_argument('--no-checksum', dest='checksum',
                           action='store_false', help='do not read the image '
                           'again for its checksum')
        group.add_argument('--ignore-space', action='store_true', help='begin '
                           'even if there seems to be too little space')
        group = one.add_argument_group('QEMU')
        group.add_argument('--buffer', type=number_of_bytes, metavar='SIZE',
                           help='snapshot-buffer-size: memory for what the '
                           'guest overwrites meanwhile')
        group.add_argument('--trap', metavar='NAME', help='snapshot-write-'
                           'trap: how guest writes are stopped')
        group.add_argument('--max-bandwidth', type=number_of_bytes,
                           metavar='SIZE', help='bytes per second')
        group.add_argument('--stall-limit', type=int, metavar='MS',
                           help='snapshot-stall-limit: for how long a guest '
                           'write may have to wait; 0: for ever')
        group.add_argument('--timeout', type=float, metavar='SECONDS',
                           help='give up if the image is not whole by then')
        group.add_argument('--paused', action='store_true', help='the VM may '
                           'be paused already: it is resumed')

    def _check_create(self, options: argparse.Namespace) -> None:
        if options.format != 'mapped-ram' and (options.channels
                                               or options.direct_io):
            self._parser.error('--channels and --direct-io need '
                               '--format mapped-ram')
        if options.overlay_dir and options.disks != 'external':
            self._parser.error('--overlay-dir is for --disks external')

    def _restore(self) -> None:
        one = self._command('restore', 'start a VM from a snapshot',
                            texts.RESTORE, texts.RESTORE_MORE)
        one.usage = ('qemu-snapshot restore [-h] DIR/NAME --qmp SOCKET '
                     '[options] [-- ARGUMENT...]')
        self._snapshot(one)
        self._qmp(one, True, 'where the new VM gets its QMP socket')
        one.add_argument('--binary', metavar='QEMU', help='another QEMU than '
                         'the one that the VM ran in')
        one.add_argument('--overlay-dir', metavar='DIR', help='where the new '
                         "overlays go, by default beside the snapshot's "
                         'disks')
        one.add_argument('--disk', metavar='ID=FILE', action='append',
                         default=[], help='use FILE, as it was when the '
                         'snapshot was taken, instead of a new overlay')
        one.add_argument('--uri', metavar='URI', help='where the image comes '
                         'from, if it is not in the snapshot')
        one.add_argument('--replace', nargs=2, action='append', default=[],
                         metavar=('OLD', 'NEW'), help='replace one argument '
                         'of the command line')
        one.add_argument('--command', action='store_true', help='what is '
                         'after -- is the whole command line, with the '
                         "snapshot's disks in it")
        one.add_argument('--paused', action='store_true',
                         help='do not let it run')
        one.add_argument('--print', action='store_true',
                         help='only show the command')
        one.add_argument('--foreground', action='store_true', help='leave '
                         'the terminal to QEMU, and wait until it has ended')
        one.add_argument('--log', metavar='FILE',
                         help='where what QEMU prints goes')


RUN: Dict[str, Callable[[argparse.Namespace, Progress], Json]] = {
    'create': lambda o, p: create.Create(o, p).run(),
    'list': verify.list_all,
    'verify': lambda o, p: verify.Verify(o, p).run(),
    'restore': lambda o, p: restore.Restore(o, p).run(),
    'delete': lambda o, p: delete.Delete(o, p).run(),
}
SHOW: Dict[str, Callable[[Json], None]] = {
    'create': show.create, 'list': show.listing, 'verify': show.verify,
    'restore': show.restore, 'delete': show.delete,
}


def open_streams() -> None:
    """Have those that are closed (">&-") be somewhere."""
    for fd in 0, 1, 2:
        try:
            os.fstat(fd)
        except OSError:
            # What we start is to have them, too
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    # pylint: disable=consider-using-with,unspecified-encoding
    sys.stdout = sys.stdout or open(os.devnull, 'w')
    sys.stderr = sys.stderr or open(os.devnull, 'w')


def main(words: Optional[List[str]] = None) -> int:
    """Returns the exit code."""
    open_streams()
    options = Parser().parse(words)
    bar = (sys.stderr.isatty() if options.progress is None
           else options.progress)
    progress = Progress(options.verbose, bar)
    code, document = 0, {'command': options.name, 'status': 'ok'}
    try:
        result = RUN[options.name](options, progress)
        document.update(result=result)
        if options.name == 'verify' and result['problems']:
            code, document['status'] = 1, 'failed'
    except SnapshotError as problem:
        code = problem.exit_code
        document.update(status=problem.status, error=str(problem))
        tell(problem, document)
    except KeyboardInterrupt:
        # Where it may leave something behind, class Signals takes it
        code = 130
        document.update(status='interrupted', error='interrupted')
    except Exception as problem:  # pylint: disable=broad-except
        code = 1
        text = str(problem)
        if not isinstance(problem, OSError):
            text = f'{type(problem).__name__}: {text}'
            if options.verbose:
                say(traceback.format_exc())
        document.update(status='failed', error=text)
        say(f'qemu-snapshot: {text}')
    try:
        if options.json:
            print(json.dumps(document, indent=2), flush=True)
        elif 'result' in document:
            SHOW[options.name](document['result'])
            sys.stdout.flush()
    except OSError as problem:
        # It is done, whether there is somebody to hear of it or not
        say(f'qemu-snapshot: cannot print the result: {problem}')
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def tell(problem: SnapshotError, document: Json) -> None:
    """Say what went wrong, and how things are now."""
    say(f'qemu-snapshot: {problem}')
    if isinstance(problem, Refused):
        say('Nothing was changed.')
    elif isinstance(problem, NotUndone):
        document['todo'] = problem.todo
        say('THIS IS LEFT TO DO:')
        for line in problem.todo:
            say(f'  {line}')
    elif document['command'] == 'create':
        say('All is as it was before.')
