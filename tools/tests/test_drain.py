# SPDX-License-Identifier: GPL-2.0-or-later
"""The program that takes the stream of a snapshot at a given pace."""

import os
import socket
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lab.drain import Drain  # noqa: E402

DATA = os.urandom(1 << 20) * 3
# Generous: nothing here takes a second on an idle machine.
PATIENCE_S = 60


class DrainTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.path = self.folder / 'image'

    def start(self, burst=0, step_ms=10, path=None):
        """A drain, and a file object to write to it."""
        reader, writer = os.pipe()
        drain = Drain(reader, path or self.path, burst, step_ms)
        self.addCleanup(drain.kill)
        os.close(reader)
        pipe = open(writer, 'wb', buffering=0)
        self.addCleanup(pipe.close)
        return drain, pipe

    def send(self, pipe, data):
        """Write it all and close, in a thread."""
        def write():
            with pipe:
                rest = memoryview(data)
                while rest:
                    rest = rest[pipe.write(rest):]
        thread = threading.Thread(target=write, daemon=True)
        thread.start()

    def wait(self, drain, received):
        end = time.monotonic() + PATIENCE_S
        while drain.control.received < received:
            self.assertLess(time.monotonic(), end)
            time.sleep(0.001)

    def test_everything_arrives_and_is_counted(self):
        drain, pipe = self.start()
        self.send(pipe, DATA)
        drain.finish(PATIENCE_S)
        self.assertEqual(self.path.read_bytes(), DATA)
        self.assertEqual(drain.control.received, len(DATA))
        self.assertGreater(drain.control.cpu_ns, 0)

    def test_into_nothing(self):
        drain, pipe = self.start(path=Path('/dev/null'))
        self.send(pipe, DATA)
        drain.finish(PATIENCE_S)
        self.assertEqual(drain.control.received, len(DATA))

    def test_counts_while_it_runs(self):
        drain, pipe = self.start()
        pipe.write(b'x' * 1000)
        self.wait(drain, 1000)
        pipe.write(b'x' * 500)
        self.wait(drain, 1500)
        self.assertEqual(drain.control.received, 1500)

    def test_rate(self):
        """No more than a burst for each step, the first one included."""
        drain, pipe = self.start(burst=100000, step_ms=10)
        began = time.monotonic()
        self.send(pipe, DATA)
        drain.finish(PATIENCE_S)
        steps = len(DATA) // 100000
        self.assertGreater(time.monotonic() - began, (steps - 1) * 0.01)
        self.assertEqual(self.path.read_bytes(), DATA)

    def test_unused_steps_are_lost(self):
        drain, pipe = self.start(burst=100000, step_ms=200)
        time.sleep(1.5)
        began = time.monotonic()
        self.send(pipe, DATA[:600000])
        self.wait(drain, 50000)
        while drain.control.received < 600000:
            received = drain.control.received
            steps = (time.monotonic() - began) // 0.2 + 2
            self.assertLessEqual(received, steps * 100000)

    def test_hold_and_full_speed(self):
        drain, pipe = self.start(burst=1000, step_ms=100)
        drain.control.held = True
        # It may be waiting for this already.
        pipe.write(b'x' * 1000)
        self.send(pipe, DATA)
        time.sleep(0.5)
        self.assertLessEqual(drain.control.received, 1000)
        drain.control.burst = 0
        drain.control.held = False
        drain.finish(PATIENCE_S)
        self.assertEqual(drain.control.received, 1000 + len(DATA))

    def test_socket(self):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.folder / 's'))
            listener.listen(1)
            drain = Drain(listener, self.path, 0, 10)
        self.addCleanup(drain.kill)
        with socket.socket(socket.AF_UNIX) as sender:
            sender.connect(str(self.folder / 's'))
            sender.sendall(DATA)
        drain.finish(PATIENCE_S)
        self.assertEqual(self.path.read_bytes(), DATA)
        self.assertEqual(drain.control.received, len(DATA))

    def test_kill(self):
        drain, pipe = self.start()
        drain.control.held = True
        drain.kill()
        with self.assertRaises(BrokenPipeError):
            for _ in range(2):
                pipe.write(b'x')

    def test_no_end(self):
        drain, pipe = self.start()
        with self.assertRaises(TimeoutError):
            drain.finish(0.1)
        pipe.close()
        drain.finish(PATIENCE_S)

    def test_a_full_disk_is_reported(self):
        drain, pipe = self.start(path=Path('/dev/full'))
        pipe.write(b'x')
        pipe.close()
        with self.assertRaises(RuntimeError):
            drain.finish(PATIENCE_S)
