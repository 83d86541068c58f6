"""Where processes meet: a small key-value store over TCP, one server in every worker for the worker's lifetime.

torch's TCPStore looks up the name of every address it connects to; where the name server drops such questions (IPv4-mapped
addresses are in no hosts file) one connection in twelve takes 5 s. Here nothing is looked up, and a wait can be abandoned.

A request is (operation, key size, value size), key, value; the answer is (size), value. A get is answered once the key is there.
"""

from __future__ import annotations

import selectors
import socket
import struct
import threading
import time
from collections import defaultdict

from elastic.collective.group import SLICE_S
from elastic.errors import GroupBroken

REQUEST, ANSWER = struct.Struct("!cII"), struct.Struct("!I")
SET, GET, CHECK = b"S", b"G", b"C"


class Endpoint:
    """This worker's server on a free port: any generation may meet here, under a prefix of its own."""

    def __init__(self, host: str = "127.0.0.1"):
        self._socket = socket.create_server((host, 0), backlog=128)
        self.address = f"{host}:{self._socket.getsockname()[1]}"
        self._values: dict[bytes, bytes] = {}
        self._waiting: dict[bytes, list[socket.socket]] = defaultdict(list)
        self._read: dict[socket.socket, bytearray] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        threading.Thread(target=self._serve, name="elastic-store", daemon=True).start()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._socket:
                    self._accept()
                else:
                    self._hear(key.fileobj)  # type: ignore[arg-type]

    def _accept(self) -> None:
        client, _ = self._socket.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._read[client] = bytearray()
        self._selector.register(client, selectors.EVENT_READ)

    def _hear(self, client: socket.socket) -> None:
        try:
            heard = client.recv(65536)
        except OSError:
            heard = b""
        if not heard:
            self._forget(client)
            return
        buffer = self._read[client]
        buffer += heard
        while len(buffer) >= REQUEST.size:
            operation, key_size, value_size = REQUEST.unpack_from(buffer)
            end = REQUEST.size + key_size + value_size
            if len(buffer) < end:
                return
            key, value = bytes(buffer[REQUEST.size:end - value_size]), bytes(buffer[end - value_size:end])
            del buffer[:end]
            self._do(client, operation, key, value)

    def _do(self, client: socket.socket, operation: bytes, key: bytes, value: bytes) -> None:
        if operation == SET:
            self._values[key] = value
            self._answer(client, b"")
            for waiter in self._waiting.pop(key, []):
                self._answer(waiter, value)
        elif operation == CHECK:
            self._answer(client, b"1" if key in self._values else b"")
        elif key in self._values:
            self._answer(client, self._values[key])
        else:
            self._waiting[key].append(client)

    def _answer(self, client: socket.socket, value: bytes) -> None:
        """Answers are small, and a client has one question at a time: this never blocks."""
        try:
            client.sendall(ANSWER.pack(len(value)) + value)
        except OSError:
            self._forget(client)

    def _forget(self, client: socket.socket) -> None:
        if self._read.pop(client, None) is not None:
            self._selector.unregister(client)
            client.close()


class StoreClient:
    """One group's connection to the store at `address` (host:port). Whatever goes wrong is `GroupBroken`."""

    def __init__(self, address: str, prefix: str, abandoned: threading.Event, timeout_s: float):
        host, _, port = address.rpartition(":")
        self._address, self._prefix, self._abandoned, self._timeout_s = address, prefix, abandoned, timeout_s
        self._lock = threading.Lock()
        self._what = f"Group {prefix}: the store at {address}"
        try:
            self._socket = socket.create_connection((host, int(port)), timeout=timeout_s)
        except OSError as error:
            raise GroupBroken(f"{self._what} cannot be reached: {error}.") from error
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.settimeout(SLICE_S)

    def clone(self) -> StoreClient:
        """Another connection with the same prefix."""
        return StoreClient(self._address, self._prefix, self._abandoned, self._timeout_s)

    def set(self, key: str, value: bytes) -> None:
        self._ask(SET, key, value)

    def get(self, key: str) -> bytes:
        """The value, once there is one."""
        return self._ask(GET, key)

    def check(self, key: str) -> bool:
        return bool(self._ask(CHECK, key))

    def _ask(self, operation: bytes, key: str, value: bytes = b"") -> bytes:
        name = f"{self._prefix}/{key}".encode()
        with self._lock:
            try:
                self._socket.sendall(REQUEST.pack(operation, len(name), len(value)) + name + value)
                deadline = time.monotonic() + self._timeout_s
                return self._receive(ANSWER.unpack(self._receive(ANSWER.size, key, deadline))[0], key, deadline)
            except GroupBroken:
                self._socket.close()  # its answer may still come: nothing else may be asked here
                raise
            except OSError as error:
                raise GroupBroken(f"{self._what} is gone: {error}.") from error

    def _receive(self, size: int, key: str, deadline: float) -> bytes:
        found = b""
        while len(found) < size:
            try:
                more = self._socket.recv(size - len(found))
            except TimeoutError:
                if self._abandoned.is_set():
                    raise GroupBroken(f"{self._what}: waiting for {key} was abandoned.") from None
                if time.monotonic() > deadline:
                    raise GroupBroken(f"{self._what}: no {key} within {self._timeout_s:g} s.") from None
                continue
            if not more:
                raise GroupBroken(f"{self._what} is gone.")
            found += more
        return found
