# SPDX-License-Identifier: GPL-2.0-or-later
"""Run programs that report in TAP, as QEMU's tests do."""

import os
import re
import signal
import subprocess


running = set()


def kill(process):
    """End a program and whatever it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def kill_all():
    """End all that run() has started, in whatever thread."""
    for process in list(running):
        kill(process)


def run(command, log, timeout, **kwargs):
    """Run a test program; {path: 'ok', 'not ok' or 'skip: reason'}.

    `log` is where its output goes, `timeout` is in seconds.  A program that
    dies or hangs adds a 'not ok' that says so.
    """
    with open(log, 'w') as out:
        process = subprocess.Popen(command, stdout=out, stderr=out,
                                   stdin=subprocess.DEVNULL,
                                   start_new_session=True, **kwargs)
        running.add(process)
        try:
            end = f'exit status {process.wait(timeout)}'
        except subprocess.TimeoutExpired:
            end = f'killed after {timeout} seconds'
        finally:
            # Nothing may go on beside the next test.
            kill(process)
            process.wait()
            running.remove(process)
    with open(log, errors='replace') as f:
        results, planned, last = parse(f.read())
    failed = 'not ok' in results.values()
    if len(results) != planned or (process.returncode and not failed):
        results[f'({os.path.basename(command[0])}: {end} after {last}, '
                f'{len(results)} of {planned or "unknown"} tests run)'
                ] = 'not ok'
    return results


def parse(text):
    """Results, how many were planned, and the test that ran last."""
    results, planned, last = {}, None, 'nothing'
    for line in text.splitlines():
        plan = re.fullmatch(r'1\.\.(\d+)', line)
        if plan:
            planned = int(plan[1])
        m = re.match(r'(ok|not ok) \d+ (\S+)(?:\s+# (.*))?', line)
        if m:
            note = m[3] or ''
            results[m[2]] = ('skip: ' + note[4:].strip()
                             if note.upper().startswith('SKIP') else m[1])
            last = m[2]
        running = re.match(r'# Running (\S+)', line)
        if running:
            last = running[1]
    return results, planned, last


def summary(passed, failed, skipped):
    return f'{passed} passed, {failed} failed, {skipped} skipped'
