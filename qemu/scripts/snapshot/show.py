# SPDX-License-Identifier: GPL-2.0-or-later

"""
Results of commands, on stdout, for humans.
"""

import shlex
from typing import Any, Dict

from .progress import duration, size


Json = Dict[str, Any]


def create(result: Json) -> None:
    """The end of "create", for humans."""
    figures = result['result']
    image = result['image']
    where = image.get('uri') or size(image['size'])
    print(f'{result["name"]}: {where}, '
          f'{figures.get("total-time", 0) / 1e3:.1f} s; the VM stood still '
          f'for {duration(figures["pause-seconds"] * 1e6)}')
    for disk in result['disks']['list']:
        if 'overlay' in disk:
            print(f'  disk {disk["id"]} is now {disk["overlay"]}, on '
                  f'{disk["file"]}')


def listing(result: Json) -> None:
    """The snapshots of a directory, for humans."""
    rows = [('NAME', 'CREATED', 'SIZE', 'FORMAT', 'DISKS', 'MACHINE', 'QEMU')]
    for one in result['snapshots']:
        taken = '-' if one['allocated'] is None else size(one['allocated'])
        rows.append((one['name'], one['created'], taken, one['format'],
                     f'{len(one["disks"])} {one["mode"]}',
                     one['qemu']['machine'], one['qemu']['version']))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows if len(rows) > 1 else []:
        print('  '.join(word.ljust(width) for word, width
                        in zip(row, widths)).rstrip())
    for one in result['snapshots']:
        for disk in one['disks']:
            over = disk.get('overlay')
            print(f'{one["name"]}: disk {disk["id"]} is {disk["file"]}'
                  + (f', with {over} on it' if over else ''))
    for one in result['damaged']:
        print(f'{one["name"]}: NOT GOOD: {one["problem"]}')
    for name in result['partial']:
        print(f'{name}: no snapshot, "create" runs or was killed '
              '(then: delete --partial)')
    for name in result['deleting']:
        print(f'{name}: no snapshot, half deleted (delete it again)')


def verify(result: Json) -> None:
    """What was found, for humans."""
    for line in result['skipped']:
        print(f'not checked: {line}')
    for line in result['problems']:
        print(f'NOT GOOD: {line}')
    if not result['problems']:
        print(f'{result["name"]} is good')


def restore(result: Json) -> None:
    """The new VM, for humans."""
    if 'shell' in result:
        print(f'cd {shlex.quote(result["cwd"])}')
        print(result['shell'])
        print(f'# then migrate-incoming {result["uri"]}')
        return
    print(f'process {result["pid"]} is {result["status"]}, its monitor is '
          f'{result["qmp"]}')
    for path in result['disks']:
        print(f'  it writes to {path}')


def delete(result: Json) -> None:
    """What is left, for humans."""
    print(f'{result["name"]} is deleted')
    for disk in result.get('disks', []):
        if disk['was']:
            print(f'  {disk["was"]} is merged into {disk["file"]}')
