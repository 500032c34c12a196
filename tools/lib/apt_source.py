# SPDX-License-Identifier: GPL-2.0-or-later
"""Sources that apt is configured with, and private sources made from them.

`apt-get indextargets` tells the same only of lists that have been downloaded,
and not the keyrings.
"""

import os
import re
import subprocess
from pathlib import Path

STABLE_NAMES = ('stable', 'oldstable', 'oldoldstable', 'testing')


def etc():
    """apt's source list file and directory (APT_CONFIG is honoured)."""
    text = subprocess.run(
        ['apt-config', 'shell', 'FILE', 'Dir::Etc::sourcelist/f',
         'PARTS', 'Dir::Etc::sourceparts/d'],
        check=True, capture_output=True, text=True).stdout
    found = dict(re.findall(r"^(\w+)='(.*)'$", text, re.M))
    return Path(found['FILE']), Path(found['PARTS'])


def parse_list(text):
    """One-line format: deb [key=value ...] URI suite component..."""
    for line in text.splitlines():
        m = re.match(r'\s*(deb|deb-src)\s+(?:\[(.*?)\]\s+)?(\S+)\s+(\S+)'
                     r'\s*([^#]*)', line)
        if m:
            options = dict(re.findall(r'([\w-]+)=(\S+)', m[2] or ''))
            yield {'types': m[1], 'uris': m[3], 'suites': m[4],
                   'components': m[5].strip(), **options}


def parse_sources(text):
    """deb822 format: stanzas of `Key: value`, values may be continued."""
    text = re.sub(r'^#.*\n', '', text, flags=re.M)
    for stanza in re.split(r'\n\s*\n', text):
        found = re.findall(r'^([A-Za-z-]+):[ \t]*((?:.*)(?:\n[ \t].*)*)',
                           stanza, re.M)
        entry = {key.lower(): value.rstrip() for key, value in found}
        if 'uris' in entry and entry.get('enabled', 'yes').lower() \
                not in ('no', 'false', '0'):
            yield entry


def entries():
    """All enabled entries as dictionaries, with deb822 keys in lower case."""
    file, parts = etc()
    files = [file] if file.is_file() else []
    if parts.is_dir():
        files += sorted(parts.glob('*.list')) + sorted(parts.glob('*.sources'))
    for path in files:
        text = path.read_text()
        yield from (parse_sources(text) if path.suffix == '.sources'
                    else parse_list(text))


def codename():
    release = os.environ.get('OS_RELEASE', '/etc/os-release')
    found = dict(re.findall(r'^(\w+)="?(.*?)"?$', Path(release).read_text(),
                            re.M))
    return found.get('VERSION_CODENAME', '') \
        if found.get('ID') == 'debian' else ''


def own_entry():
    """The machine's entry for its Debian release, or None."""
    wanted = {codename(), *STABLE_NAMES} if codename() else set()
    for entry in entries():
        if ('deb' in entry['types'].split()
                and 'main' in entry.get('components', '').split()
                and not entry['uris'].startswith('cdrom:')
                and wanted & set(entry['suites'].split())):
            return entry
    return None


def private_entry(suite, kind='deb'):
    """A deb822 entry for `suite`; None if apt has no Debian mirror.

    From the same place, with the same keyring, as the machine's own.
    """
    entry = own_entry()
    if not entry:
        return None
    entry = dict(entry, types=kind, suites=suite, components='main')
    # These say what the machine wants, not where the archive is.
    for key in 'architectures', 'arch', 'enabled', 'targets', 'target':
        entry.pop(key, None)
    return ''.join(f'{key.title()}: {value}\n' for key, value in
                   entry.items())


def sites():
    """What names the machine's mirrors: hosts, or whole URIs without one."""
    found = set()
    for entry in entries():
        for uri in entry['uris'].split():
            if uri.startswith('cdrom:'):
                continue
            m = re.match(r'\w+(?:\+\w+)?://(?:[^/@]*@)?([^/:]+)', uri)
            host = m[1] if m else ''
            found.add(host if re.search(r'[a-z].*\.', host)
                      else re.sub(r'^\w+:/*', '', uri).rstrip('/'))
    return {site for site in found if len(site) > 3}
