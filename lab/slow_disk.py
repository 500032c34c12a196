"""A disk that takes its time for each read: an NBD server in this process.

It holds but one byte value, and speaks as much of the protocol as QEMU needs;
see https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md.

SPDX-License-Identifier: GPL-2.0-or-later
"""
import socket
import struct
import threading
import time
from typing import BinaryIO, List

SIZE = 64 << 20
GREETING = b'NBDMAGIC' b'IHAVEOPT' + struct.pack('>H', 3)
OPTION, OPTION_REPLY, REPLY = '>QII', '>QIII', '>IIQ'
REQUEST = '>IHHQQI'
OPTION_MAGIC, REPLY_MAGIC = 0x3e889045565a9, 0x67446698
OPT_GO, REP_ACK, REP_INFO, REP_ERR_UNSUP = 7, 1, 3, 0x80000001
READ, DISCONNECT = 0, 2


class SlowDisk(threading.Thread):
    """Use as a context manager.  Reads take @seconds each, side by side."""

    def __init__(self, seconds: float):
        super().__init__(daemon=True)
        self._seconds = seconds
        self._server = socket.create_server(('127.0.0.1', 0))
        self._lock = threading.Lock()

    def __enter__(self) -> 'SlowDisk':
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def arguments(self) -> List[str]:
        """QEMU's, which make it the guest's /dev/vda."""
        port = self._server.getsockname()[1]
        return ['-blockdev', 'driver=nbd,node-name=slow,server.type=inet,'
                f'server.host=127.0.0.1,server.port={port},read-only=on,'
                'cache.direct=on', '-device', 'virtio-blk-pci,drive=slow']

    def run(self) -> None:
        try:
            client, _ = self._server.accept()
            with client, client.makefile('rb') as requests:
                self._negotiate(client, requests)
                self._serve(client, requests)
        except (OSError, struct.error):
            pass  # QEMU has ended.

    @staticmethod
    def _negotiate(client: socket.socket, requests: BinaryIO) -> None:
        client.sendall(GREETING)
        requests.read(4)
        option = None
        while option != OPT_GO:
            _, option, size = struct.unpack(OPTION, requests.read(16))
            requests.read(size)
            replies = [(REP_ERR_UNSUP, b'')]
            if option == OPT_GO:
                replies = [(REP_INFO, struct.pack('>HQH', 0, SIZE, 1)),
                           (REP_ACK, b'')]
            for kind, data in replies:
                client.sendall(struct.pack(OPTION_REPLY, OPTION_MAGIC, option,
                                           kind, len(data)) + data)

    def _serve(self, client: socket.socket, requests: BinaryIO) -> None:
        while True:
            _, _, kind, handle, _, size = struct.unpack(
                REQUEST, requests.read(28))
            if kind == DISCONNECT:
                return
            threading.Thread(target=self._answer, daemon=True, args=(
                client, handle, size if kind == READ else 0)).start()

    def _answer(self, client: socket.socket, handle: int, size: int) -> None:
        time.sleep(self._seconds if size else 0)
        try:
            with self._lock:
                client.sendall(struct.pack(REPLY, REPLY_MAGIC, 0, handle)
                               + b'Z' * size)
        except OSError:
            pass
