"""The tables of the README, in Markdown, and how they get there.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import re
from statistics import median
from textwrap import wrap
from typing import Dict, List, Optional, Sequence, Tuple

from .figures import BY_NAME, Measurement
from .report import ratio, samples
from .rows import FORMATS, LIVE, ROWS, STOCK

# Label, row, figure: a line of a table whose columns are the traps.
Line = Tuple[str, str, str]
_PACED = 'paced-slow-sink'
_FULL_FILE, _FULL_SINK = 'full-fast-file', 'full-slow-sink'
WRITES: List[Line] = [
    ('full speed, file: huge pages, 5 s on', _FULL_FILE, 'kept, 5 s after'),
    ('– the snapshot takes', _FULL_FILE, 'snapshot'),
    ('– all stopped writes together', _FULL_FILE, 'trapped writes, sum'),
    ('– p50 of the stopped writes', _FULL_FILE, 'trapped writes, p50'),
    ('– speed 1 s after', _FULL_FILE, 'speed, 1 s after'),
    ('– speed kept, one core', 'one-core', 'speed kept'),
    ('full speed, slow sink: speed kept', _FULL_SINK, 'speed kept'),
    ('– speed 30 s after', _FULL_SINK, 'speed, 30 s after'),
    ('2,000/s, slow sink: p99.9', _PACED, 'all writes, p99.9'),
    ('– p50 of the stopped writes', _PACED, 'trapped writes, p50'),
    ('– all stopped writes together', _PACED, 'trapped writes, sum'),
    ('– the snapshot takes', _PACED, 'snapshot'),
    ('– QEMU\'s memory: more, peak', _PACED, 'more, peak'),
    ('– more at the end', _PACED, 'more, at the end'),
    ('16 GiB, 256 MiB written to: takes', 'touched-256m-of-16g', 'snapshot'),
    ('– 1 GiB with the same', 'touched-256m-of-1g', 'snapshot'),
    ('SQLite, file: commits, of before', 'database-fast-file',
     'operations, during'),
    ('– the snapshot takes', 'database-fast-file', 'snapshot'),
    ('– file in tmpfs: commits', 'database-other-file-system',
     'operations, during'),
    ('– the snapshot takes', 'database-other-file-system', 'snapshot'),
]
FREEZE: List[Line] = [
    (label, row.name, figure) for row in ROWS if row.name.startswith('freeze-')
    for label, figure in (
        (row.name.partition('-')[2].replace('no-', 'no ').replace('-', ', '),
         'freeze, QMP'),
        ('– as the guest sees it', 'freeze, guest'))]
FREEZE_INTRO = '''\
How long the VM stands still, from STOP to RESUME: guests of 1 GiB and 8 GiB,
idle or (busy) writing at full speed, with and without huge pages (thp).
'''
# Whether the ratio to stock is shown.
THROUGHPUT = {'snapshot': False, 'throughput': True, 'CPU per GiB': False,
              'all writes, p99.9': True, 'freeze, QMP': False}


def _cell(figure_name: str, own: Sequence[Measurement],
          stock: Sequence[Measurement]) -> str:
    figure = BY_NAME[figure_name]
    values = samples(figure, own)
    if not values:
        return '–'
    shown = figure.show(median(values)).replace(' us', ' µs')
    if own is stock or not figure.compared:
        return shown
    return f'{shown} {ratio(values, samples(figure, stock))}'.strip()


def _table(head: Sequence[str], lines: Sequence[Sequence[str]],
           measured: Sequence[Measurement]) -> str:
    last = {m['row']: m['round'] for m in measured}.values()
    note = 'One round' if max(last) == 1 else (
        'Medians of ' + ' to '.join(map(str, sorted({min(last), max(last)})))
        + ' rounds')
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in (
        head, ['---'] * len(head), *lines)) + (
            f'\n\n{note}; in brackets the ratio to stock, with ~ if no '
            'difference is shown.\n')


def _by_trap(lines: Sequence[Line], measurements: Sequence[Measurement]
             ) -> Optional[str]:
    shown, used = [], []
    for label, row, figure in lines:
        columns = [[m for m in measurements if m['row'] == row
                    and m['variant'] == v.name] for v in LIVE]
        if any(columns):
            used += sum(columns, [])
            shown.append([label] + [_cell(figure, own, columns[0])
                                    for own in columns])
    return _table(['', *[v.name for v in LIVE]], shown, used) if used else None


def _throughput(measurements: Sequence[Measurement]) -> Optional[str]:
    used = [m for m in measurements if m['row'] == 'throughput']
    if not used:
        return None
    own = {v.name: [m for m in used if m['variant'] == v.name]
           for v in FORMATS}
    [what] = [row.what for row in ROWS if row.name == 'throughput']
    lines = [[name, *[_cell(figure, some,
                            own[STOCK.name] if compared else some)
                      for figure, compared in THROUGHPUT.items()]]
             for name, some in own.items() if some]
    return '\n'.join([*wrap(f'{what}:', 80), '',
                      _table(['', *THROUGHPUT], lines, used)])


def tables(measurements: Sequence[Measurement]) -> Dict[str, str]:
    """Those for which something was measured, by name."""
    made = {'writes': _by_trap(WRITES, measurements),
            'throughput': _throughput(measurements),
            'freeze': _by_trap(FREEZE, measurements)}
    if made['freeze']:
        made['freeze'] = f'{FREEZE_INTRO}\n{made["freeze"]}'
    return {name: text for name, text in made.items() if text}


def fill(text: str, parts: Dict[str, str]) -> str:
    """Put parts where @text has <!-- bench:NAME --> ... <!-- /bench -->.

    Raises ValueError if it has no place for one of them.  Places for which
    there is no part stay as they are.
    """
    for name, part in parts.items():
        text, count = re.subn(
            rf'(<!-- bench:{re.escape(name)} -->\n).*?(<!-- /bench -->)',
            lambda found: f'{found[1]}\n{part}\n{found[2]}',
            text, flags=re.S)
        if count != 1:
            raise ValueError(f'{count} places for {name} instead of one')
    return text
