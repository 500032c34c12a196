"""Plots of measurements.

SPDX-License-Identifier: GPL-2.0-or-later
"""
from pathlib import Path
from statistics import median
from typing import Any, Callable, Dict, List, Sequence, Tuple

import matplotlib
from PIL import Image
matplotlib.use('Agg')
from matplotlib import pyplot  # noqa: E402
from matplotlib.ticker import LogFormatter  # noqa: E402

from .figures import BY_NAME, Measurement  # noqa: E402
from .report import samples  # noqa: E402
from .rows import FORMATS, LIVE, ROWS  # noqa: E402
from .writes import BUCKET_NS, WINDOWS  # noqa: E402

# The same data give the same file, which has text as text.
STYLE = {'svg.hashsalt': 'bench', 'svg.fonttype': 'none', 'font.size': 9,
         'axes.grid': True, 'grid.alpha': 0.3, 'legend.fontsize': 8,
         'figure.constrained_layout.use': True}
METADATA: Dict[str, Dict[str, Any]] = {'svg': {'Date': None},
                                       'png': {'Software': None}}
# Of a line: more would not be seen, but make the files large.
MOST_POINTS = 160


class Nothing(Exception):
    """What a plot would show was not measured."""


def _of(measurements: Sequence[Measurement], row: str, variant: str
        ) -> List[Measurement]:
    return [m for m in measurements if m['row'] == row
            and m['variant'] == variant]


def _live(measurements: Sequence[Measurement], row: str
          ) -> Dict[str, List[Measurement]]:
    found = {v.name: _of(measurements, row, v.name) for v in LIVE}
    return {name: own for name, own in found.items() if own}


def _middle(measurements: Sequence[Measurement], row: str, variant: str,
            figure: str) -> float:
    """The median of the rounds; not a number if there is none."""
    values = samples(BY_NAME[figure], _of(measurements, row, variant))
    return median(values) if values else float('nan')


def _plain(axis: matplotlib.axis.Axis) -> None:
    """Numbers of a logarithmic axis without powers."""
    axis.set_major_formatter('{x:g}')
    axis.set_minor_formatter(LogFormatter())


def _series(m: Measurement, key: str, step: float, join: Callable
            ) -> Tuple[List[float], List[float]]:
    """Times since the snapshot's begin, and what the windows have each @step.

    @join makes one of several values, so that there are not too many.
    """
    times, values = [], []
    begin = -m['windows']['before']['seconds']
    group = -(-sum(len(m['windows'][name][key]) for name in WINDOWS)
              // MOST_POINTS)
    for name in WINDOWS:
        window = m['windows'][name]
        for at in range(0, len(window[key]), group):
            times.append(begin + step * at)
            values.append(join(window[key][at:at + group]))
        begin += window['seconds']
    return times, values


def _latency(measurements: Sequence[Measurement]) -> None:
    """The longest writes over time."""
    columns = _live(measurements, 'paced-slow-sink')
    if not columns:
        raise Nothing
    _, axes = pyplot.subplots(len(columns), sharex=True, sharey=True,
                              squeeze=False,
                              figsize=(7, 0.6 + 1.2 * len(columns)))
    for ax, (name, own) in zip(axes[:, 0], columns.items()):
        times, longest = _series(own[0], 'longest_ns', 0.01, max)
        ax.plot(times, [ns / 1e6 or float('nan') for ns in longest],
                linewidth=0.8)
        ax.axvspan(0, own[0]['windows']['during']['seconds'], color='orange',
                   alpha=0.2, label='snapshot')
        ax.set_yscale('log')
        _plain(ax.yaxis)
        ax.set_title(name, loc='left', fontsize=9)
        ax.legend(loc='upper right')
    axes[0, 0].get_figure().supylabel('longest write, ms')
    axes[-1, 0].set_xlabel('seconds; 2,000 random page writes a second, '
                           'destination takes 60 MB/s')


def _longer(own: Sequence[Measurement]) -> Tuple[List[float], List[float]]:
    """Times of writes in ns, and the part of all writes that took longer."""
    windows = [m['windows']['during'] for m in own]
    total = left = sum(w['writes'] for w in windows)
    points = []
    for bucket in range(max(len(w['fast']) for w in windows)):
        left -= sum(sum(w['fast'][bucket:bucket + 1]) for w in windows)
        points.append(((bucket + 1) * BUCKET_NS, left / total))
    slow = sorted(ns for w in windows
                  for ns in w['slow_first_ns'] + w['slow_again_ns'])
    # Ever denser to the end, as the axis is.
    place = 0.0
    while place < len(slow):
        points.append((slow[int(place)], (len(slow) - int(place)) / total))
        place += max(1, (len(slow) - place) / 25)
    points = [p for p in points if p[1] > 0]
    return [x for x, _ in points], [y for _, y in points]


def _distribution(measurements: Sequence[Measurement]) -> None:
    """Which part of the writes takes longer than what."""
    columns = _live(measurements, 'paced-slow-sink')
    if not columns:
        raise Nothing
    _, ax = pyplot.subplots(figsize=(7, 3.5))
    for name, own in columns.items():
        times, parts = _longer(own)
        ax.step([ns / 1e3 for ns in times], parts, where='post', label=name)
    ax.set(xscale='log', yscale='log', ylabel='part that takes longer',
           xlabel='write, microseconds; during the snapshot, 2,000 a second, '
           'destination takes 60 MB/s')
    ax.legend()


def _speed(measurements: Sequence[Measurement]) -> None:
    """Writes a second, of those before."""
    rows = [r for r in ROWS if r.name in ('full-fast-file', 'full-slow-sink',
                                          'one-core')
            and _live(measurements, r.name)]
    if not rows:
        raise Nothing
    _, axes = pyplot.subplots(len(rows), squeeze=False, sharey=True,
                              figsize=(7, 0.5 + 2.2 * len(rows)))
    for ax, row in zip(axes[:, 0], rows):
        for name, own in _live(measurements, row.name).items():
            windows = own[0]['windows']
            usual = median(windows['before']['per_100ms']) or 1
            times, speeds = _series(own[0], 'per_100ms', 0.1,
                                    lambda v: sum(v) / len(v))
            [line] = ax.plot(times, [s / usual * 100 for s in speeds],
                             linewidth=0.8, label=name)
            ax.axvline(windows['during']['seconds'], linestyle=':',
                       color=line.get_color())
        ax.axvline(0, linestyle=':', color='black')
        ax.set_ylim(bottom=0)
        ax.set_title(row.what, loc='left', fontsize=9)
        ax.legend(loc='lower right')
    axes[0, 0].get_figure().supylabel('speed, % of that before')
    axes[-1, 0].set_xlabel('seconds; dotted: begin and ends of the snapshots')


def _freeze(measurements: Sequence[Measurement]) -> None:
    """Freeze against RAM, with and without huge pages, idle and busy."""
    cases = {r.name: r for r in ROWS if r.name.startswith('freeze-')}
    measured = {m['row'] for m in measurements} & set(cases)
    panels = [busy for busy in ('', '-busy')
              if any(name.endswith('-busy') == bool(busy)
                     for name in measured)]
    if not panels:
        raise Nothing
    sizes = [name for name in cases
             if not name.endswith(('-busy', '-no-thp'))]
    _, axes = pyplot.subplots(1, len(panels), squeeze=False, sharey=True,
                              figsize=(7, 3.8))
    for ax, busy in zip(axes[0], panels):
        for number, variant in enumerate(LIVE):
            for thp, line in (('', '-'), ('-no-thp', '--')):
                values = [_middle(measurements, f'{size}{thp}{busy}',
                                  variant.name, 'freeze, QMP') / 1e6
                          for size in sizes]
                if any(value == value for value in values):
                    ax.plot(range(len(sizes)), values, f'o{line}',
                            color=f'C{number}')
            ax.plot([], color=f'C{number}', label=variant.name)
        ax.set_xticks(range(len(sizes)), [
            cases[s].what.split(', with')[0].replace(', ', ',\n')
            for s in sizes], fontsize=8)
        ax.set(yscale='log', title='full speed' if busy else 'idle')
        _plain(ax.yaxis)
    axes[0, 0].set_ylabel('from STOP to RESUME, ms')
    axes[0, 0].get_figure().supxlabel('dashed: without huge pages',
                                      fontsize=9)
    axes[0, 0].legend()


def _throughput(measurements: Sequence[Measurement]) -> None:
    """Throughput against channels, between what others reach."""
    if not any(m['row'] == 'throughput' for m in measurements):
        raise Nothing
    _, ax = pyplot.subplots(figsize=(7, 4.2))
    counts = [0, 1, 2, 4]
    lines: Dict[str, Dict[int, float]] = {}
    for v in FORMATS:
        value = _middle(measurements, 'throughput', v.name, 'throughput') / 1e6
        if value != value:
            continue
        if v.format.mapped:
            name = f'{v.trap or v.how}, mapped-ram' + (
                ', direct' if v.format.direct else '')
            lines.setdefault(name, {})[v.format.channels] = value
        else:
            ax.axhline(value, linestyle=':', linewidth=0.8, color='grey')
            ax.annotate(v.name if v.how != 'live' else f'{v.name}, stream',
                        (3.05, value), fontsize=7, va='bottom')
    for name, points in lines.items():
        ax.plot([counts.index(c) for c in points], list(points.values()),
                'o-', label=name)
    ax.set_xticks(range(len(counts)), ['no multifd', '1', '2', '4'])
    ax.set(yscale='log', ylabel='MB/s', xlim=(-0.2, 3.9),
           xlabel='multifd channels; dotted: without mapped-ram')
    _plain(ax.yaxis)
    if lines:
        ax.legend(loc='upper center', bbox_to_anchor=(0.5, -0.15), ncol=3)


# In the README's order.
PLOTS = {
    'latency': _latency,
    'distribution': _distribution,
    'speed': _speed,
    'freeze': _freeze,
    'throughput': _throughput,
}


def draw(measurements: Sequence[Measurement], folder: Path) -> List[str]:
    """Write NAME.svg and NAME.png; returns the names of what there is."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with pyplot.rc_context(STYLE):
        for name, plot in PLOTS.items():
            try:
                plot(measurements)
            except Nothing:
                continue
            for kind, metadata in METADATA.items():
                pyplot.savefig(folder / f'{name}.{kind}', dpi=90,
                               metadata=metadata)
            pyplot.close()
            # Lines and text do with few colours, and are then much smaller.
            png = folder / f'{name}.png'
            Image.open(png).convert('RGB').quantize(64).save(png, optimize=True)
            drawn.append(name)
    return drawn
