"""What strangers and mad members may do to a port: all of it on loopback, bounded in connections, bytes and time."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import time
from collections.abc import Iterator

FOUR_GIB = (1 << 32) - 1
ROUND = 60  # connections of a kind
PATIENCE_S = 2.0  # for one of them


def reach(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), PATIENCE_S)


def say(client: socket.socket, data: bytes) -> bool:
    """Whether all of it went out; a peer that hangs up is as good as one that takes it."""
    with contextlib.suppress(OSError):
        client.sendall(data)
        return True
    return False


def half_open(port: int, number: int = ROUND) -> Iterator[socket.socket]:
    """Connected, and not a word."""
    for _ in range(number):
        yield reach(port)


def garbage(port: int, number: int = ROUND) -> Iterator[socket.socket]:
    """Random bytes, short and long; every other one hangs up at once, some with a reset."""
    chance = random.Random(7)
    for n in range(number):
        client = reach(port)
        yield client
        say(client, chance.randbytes(chance.choice((1, 9, 63, 64, 65, 4096))))
        if n % 4 == 1:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if n % 2:
            client.close()


def large_headers(port: int, number: int = ROUND) -> Iterator[socket.socket]:
    """A request whose sizes are 4 GiB, and the first of its bytes."""
    for n in range(number):
        client = reach(port)
        yield client
        say(client, struct.pack("!cII", b"SGC"[n % 3:n % 3 + 1], FOUR_GIB, FOUR_GIB) + bytes(1024))


def slow_readers(port: int, number: int = ROUND) -> Iterator[socket.socket]:
    """Ask without end, with a small window, and read nothing."""
    for _ in range(number):
        client = socket.socket()
        yield client
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        client.settimeout(PATIENCE_S)
        client.connect(("127.0.0.1", port))
        client.setblocking(False)
        request = struct.pack("!cII", b"C", 1, 0) + b"k"
        with contextlib.suppress(OSError):
            for _ in range(20):
                client.send(request * 100)


KINDS = (half_open, garbage, large_headers, slow_readers)


@contextlib.contextmanager
def under_attack(ports: list[int]) -> Iterator[int]:
    """All kinds on all ports, held open while this lasts; gives the number of connections that were made."""
    left: list[socket.socket] = []
    try:
        for port in ports:
            for kind in KINDS:
                with contextlib.suppress(OSError):  # a port may take no more of them
                    left += kind(port)
        yield len(left)
    finally:
        for client in left:
            client.close()


def descriptors_exhausted() -> list[int]:
    """Takes all descriptors that this process may have; gives them, to be closed."""
    taken = []
    with contextlib.suppress(OSError):
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    return taken


def ends_within(client: socket.socket, seconds: float) -> bool:
    """Whether the peer hangs up, whatever it says before."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        client.settimeout(left)
        try:
            if not client.recv(65536):
                return True
        except TimeoutError:
            return False
        except OSError:
            return True
    return False
