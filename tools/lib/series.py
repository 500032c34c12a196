# SPDX-License-Identifier: GPL-2.0-or-later
"""A series as it is kept in this repository; here that of QEMU, as an example.

It is sorted by topic: patches/qemu/N-name/ has one topic's commits, in order,
and 0000-cover-letter.txt: From, Date, Subject, the text.  In git that is an
empty commit ahead of the topic's others, its marker: `N-name: Subject`, text.

NNNN-subject.patch is a mail: From, Date, Subject, the message, a line `---`,
one line `New-file: path` for each file that the commit adds, then the changes
to existing files as a git diff.  The contents and the mode of a new file are
those of qemu/<path>; one that is but a copy of another, with few changes, is
a `copy from` in the diff.
"""

import hashlib
import itertools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from tree import QEMU, ROOT, UTF8, Refused

COVER = '0000-cover-letter.txt'
COPIES = ['-C99%', '--find-copies-harder', '-l0']   # git's options for them
MARKER = re.compile(r'(\d-[a-z0-9-]+): \S')


@dataclass
class Patch:
    """A commit.  name is that of its file below patches/<project>/; a cover
    letter's message is its marker's."""
    name: str
    author: str = ''
    email: str = ''
    date: str = ''
    message: str = ''
    new_files: list = field(default_factory=list)
    diff: str = ''

    @property
    def subject(self):
        return self.message.split('\n', 1)[0]

    @property
    def topic(self):
        return self.name.rpartition('/')[0]

    @property
    def is_cover(self):
        return self.name == f'{self.topic}/{COVER}'

    def added(self):
        """{existing file: lines that the diff adds to it}"""
        return {path: re.findall(r'^\+(.*)', changes.partition('\n@@ ')[2],
                                 re.M)
                for path, changes in re.findall(
                    r'^diff --git a/(.*) b/\1\n((?:(?!diff --git ).*\n)*)',
                    self.diff, re.M)}

    def dump(self):
        """The patch file's text; parse() reads it back."""
        subject, _, body = self.message.partition('\n')
        if self.is_cover:
            subject = subject.removeprefix(f'{self.topic}: ')
        mail = (f'From: {self.author} <{self.email}>\nDate: {self.date}\n'
                f'Subject: {subject}\n\n{body.strip()}\n')
        new = ''.join(f'New-file: {path}\n' for path in self.new_files)
        return mail if self.is_cover else (
            f'{mail}---\n{new}' + ('\n' if new and self.diff else '')
            + self.diff)


def parse(project, name, text):
    """Read a patch file's text; refuses what prepare could not do exactly."""
    def bad(why):
        raise Refused(f'patches/{project.name}/{name}: {why}')

    mail, separator, rest = text.partition('\n---\n')
    head, _, body = mail.partition('\n\n')
    headers = dict(re.findall(r'^([A-Za-z-]+): (.*)$', head, re.M))
    for key in 'From', 'Date', 'Subject':
        if not headers.get(key):
            bad(f'no {key}: line')
    who = re.fullmatch(r'(.+) <(\S+)>', headers['From'])
    if not who:
        bad("From: is not of the form 'Name <address>'")
    patch = Patch(name, who[1], who[2], headers['Date'],
                  (headers['Subject'] + '\n\n' + body.strip()).strip())
    if patch.is_cover:
        patch.message = f'{patch.topic}: {patch.message}'
        if not MARKER.match(patch.message):
            bad("its folder's name is not of the form N-name, in lower case")
        if separator or not body.strip():
            bad("a cover letter has a text, and no line '---'")
        return patch
    if not separator:
        bad("no line '---' between the message and the changes")
    start = re.search(r'^diff --git ', rest, re.M)
    listing = rest[:start.start()] if start else rest
    diff = patch.diff = rest[start.start():] if start else ''
    for line in listing.splitlines():
        if line.startswith('New-file: '):
            patch.new_files.append(line[10:].strip())
        elif line.strip():
            bad(f"'{line}' is neither a New-file: line nor part of a diff")
    created = re.search(r'^(new file|deleted file|rename|GIT binary|'
                        r'Binary files).*', diff, re.M)
    if created:
        bad(f"'{created[0]}': only text changes to existing files belong "
            f'here; a new file goes to {project.name}/ with a New-file: '
            'line')
    if not patch.new_files and not diff:
        bad('changes nothing')
    return patch


class Series:
    """A project's patches and new files below `root`; there may be none."""

    def __init__(self, project=QEMU, root=ROOT):
        self.project = project
        self.new = Path(root) / project.name
        self.patches_dir = Path(root) / 'patches' / project.name
        self.patches = [
            parse(project, str(p.relative_to(self.patches_dir)), read(p))
            for p in self.patch_files()]

    def patch_files(self):
        """Cover letters as well, by folder and name."""
        return sorted(p for p in self.patches_dir.rglob('*')
                      if p.suffix == '.patch' or p.name == COVER)

    def new_files(self):
        """Paths of all files that exist below the folder of new files."""
        return sorted(str(p.relative_to(self.new)) for p in
                      self.new.rglob('*') if not p.is_dir())

    def digest(self):
        """Changes whenever a name, a mode or a byte of the series does."""
        h = hashlib.sha256()
        for path in self.patch_files() + [self.new / n
                                          for n in self.new_files()]:
            content = path.read_bytes()
            h.update(f'{path.relative_to(self.new.parent)} {mode(path)} '
                     f'{len(content)}\n'.encode() + content)
        return h.hexdigest()

    def problems(self, base_files):
        """What is wrong between new files, their listings and the base."""
        found, owner, new = [], {}, self.project.name
        for topic, patches in itertools.groupby(self.patches,
                                                lambda patch: patch.topic):
            covers = [patch.is_cover for patch in patches]
            if topic and (not covers[0] or len(covers) == 1):
                found.append(f'patches/{new}/{topic} must have {COVER} and '
                             'patches')
        for patch in self.patches:
            for path in patch.new_files:
                if path in owner:
                    found.append(f'{path} is listed by {owner[path]} and '
                                 f'{patch.name}: it belongs to one commit')
                owner[path] = patch.name
                if path in base_files:
                    found.append(f'{path}, listed by {patch.name}, exists '
                                 'in the base: change it by a hunk')
                if not (self.new / path).is_file():
                    found.append(f'{path}, listed by {patch.name}, is '
                                 f'missing below {new}/')
        for patch in self.patches:
            for path in patch.added().keys() & owner.keys():
                found.append(f'{patch.name} has a hunk for {path}, which '
                             f'{owner[path]} adds: put it into {new}/{path}')
        found += [f'{new}/{path} is listed by no patch'
                  for path in self.new_files() if path not in owner]
        return found


def topics(tree, head):
    """[name, marker, last commit] of each topic in the commits base..head."""
    found = []
    for line in tree.text('log', '--reverse', '--format=%H %s',
                          f'base..{head}').splitlines():
        commit, _, subject = line.partition(' ')
        marker = MARKER.match(subject)
        if marker:
            found.append([marker[1], commit, commit])
        elif found:
            found[-1][2] = commit
    return found


def read(path):
    # Bytes that are not UTF-8 and CRs must survive.
    return path.read_bytes().decode(*UTF8)


def mode(path):
    if path.is_symlink():
        raise Refused(f'{path} is a symbolic link; the series cannot hold it')
    return '100755' if os.access(path, os.X_OK) else '100644'


def failed_hunks(patch, stderr):
    """Explain git apply's errors: which file, which hunk."""
    lines = []
    for file, line in re.findall(r'^error: patch failed: (.*):(\d+)$',
                                 stderr, re.M):
        section = patch.diff.partition(f'\n+++ b/{file}')[2]
        hunk = re.search(rf'^@@ -{line}[ ,].*$', section, re.M)
        lines.append(f'  {file}: {hunk[0] if hunk else "line " + line}')
    for file in re.findall(r'^error: (.*): does not exist in index$',
                           stderr, re.M):
        lines.append(f'  {file}: not in this base')
    return '\n'.join(lines) or stderr.strip()


def build(tree, base, series):
    """Make the series' commits on `base` in the object store only.

    Touches neither the work tree nor a branch.  Returns the last commit.
    A patch that does not fit is refused with its hunk; no fuzz.
    """
    problems = series.problems(tree.files(base))
    if problems:
        raise Refused('\n'.join(problems))
    head = base
    with tree.temporary_index() as directory:
        index = Path(directory) / 'index'
        tree.git('read-tree', base, index=index)
        for patch in series.patches:
            if patch.diff:
                done = tree.git('apply', '--cached', '--whitespace=nowarn',
                                '-', index=index, input=patch.diff,
                                check=False)
                if done.returncode:
                    version = tree.text('log', '-1', '--format=%s', base)
                    raise Refused(f'{patch.name} does not fit this base '
                                  f'({version}):\n'
                                  + failed_hunks(patch, done.stderr))
            add_files(tree, index, series, patch.new_files)
            commit = tree.text('write-tree', index=index)
            who = {}
            for role in 'AUTHOR', 'COMMITTER':
                who[f'GIT_{role}_NAME'] = patch.author
                who[f'GIT_{role}_EMAIL'] = patch.email
                who[f'GIT_{role}_DATE'] = patch.date
            head = tree.text('commit-tree', commit, '-p', head, '-F', '-',
                             env=who, input=patch.message + '\n')
    return head


def add_files(tree, index, series, paths):
    if not paths:
        return
    full = [series.new / path for path in paths]
    blobs = tree.text('hash-object', '-w', '--no-filters', '--stdin-paths',
                      input=''.join(f'{p}\n' for p in full)).split()
    tree.git('update-index', '--add', '--index-info', index=index,
             input=''.join(f'{mode(p)} {blob}\t{path}\n' for p, blob, path
                           in zip(full, blobs, paths)))
