# SPDX-License-Identifier: GPL-2.0-or-later

"""
What is told while a command runs: all of it on stderr, since stdout is for
the result.
"""

import sys
import time
from typing import Any, Dict, Optional


Json = Dict[str, Any]

WIDTH = 20


def size(number: float) -> str:
    """Bytes for humans."""
    for unit in ('B', 'KiB', 'MiB', 'GiB'):
        if number < 1024:
            break
        number /= 1024
    else:
        unit = 'TiB'
    return f'{number:.0f} {unit}' if number >= 100 or unit == 'B' else \
        f'{number:.1f} {unit}'


def duration(us: float) -> str:
    """Microseconds for humans."""
    if us < 1000:
        return f'{us:.0f} us'
    return f'{us / 1e3:.1f} ms' if us < 1e6 else f'{us / 1e6:.1f} s'


def say(text: str, end: str = '\n') -> None:
    """Tell the user, if there still is one: the VM is not to feel it."""
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass


class Progress:
    """Steps, as lines with --verbose, and a bar on terminals."""

    def __init__(self, verbose: bool, bar: bool):
        self._verbose = verbose
        self._bar = bar
        self._shown = 0
        self._since = time.monotonic()

    def step(self, text: str) -> None:
        """One step is about to be made."""
        if self._verbose:
            self.warn(text)

    def warn(self, text: str) -> None:
        """Something that the user should know in any case."""
        self._draw('')
        say(text)

    def migration(self, info: Json) -> None:
        """How far the image is, from query-migrate."""
        ram = info.get('ram')
        if not self._bar or not ram or not ram.get('total'):
            return
        more = info.get('background-snapshot') or {}
        total = ram['total']
        written = ram['transferred']
        rate = written / max(0.1, time.monotonic() - self._since)
        self.bar((total - ram['remaining']) / total,
                 f'{size(written)} written, {size(rate)}/s'
                 + self._buffer(more.get('buffer'))
                 + self._stalls(more.get('stalls')))

    @staticmethod
    def _buffer(buffer: Optional[Json]) -> str:
        if not buffer:
            return ''
        # The destination is too slow, or the buffer too small
        full = f' (full {buffer["waits"]} times)' if buffer['waits'] else ''
        return f', buffer {size(buffer["used"])} of {size(buffer["size"])}' \
            + full

    @staticmethod
    def _stalls(stalls: Optional[Json]) -> str:
        if not stalls or not stalls['count']:
            return ''
        return (f', {stalls["count"]} writes stopped '
                f'(longest {duration(stalls["longest"])})')

    def bar(self, part: float, text: str) -> None:
        """A bar of which some part is done."""
        if self._bar:
            part = min(1.0, max(0.0, part))
            done = int(part * WIDTH)
            self._draw(f'[{"#" * done}{"." * (WIDTH - done)}] '
                       f'{part * 100:3.0f}%  {text}')

    def restart(self) -> None:
        """What comes now has a rate of its own."""
        self._since = time.monotonic()

    def end(self) -> None:
        """There is no more to show."""
        self._draw('')

    def _draw(self, line: str) -> None:
        if not self._bar or not (line or self._shown):
            return
        padding = ' ' * max(0, self._shown - len(line))
        say(f'\r{line}{padding}', end='' if line else '\r')
        self._shown = len(line)


def report(info: Json) -> Json:
    """What a manifest keeps of query-migrate's last answer."""
    kept = {name: info[name] for name in
            ('total-time', 'downtime', 'setup-time', 'background-snapshot')
            if name in info}
    ram = info.get('ram', {})
    kept.update({f'ram-{name}': ram[name] for name in
                 ('total', 'transferred', 'mbps') if name in ram})
    return kept
