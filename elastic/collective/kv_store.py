"""Where processes meet: a small key-value store over TCP, one server in every worker for the worker's lifetime.

torch's TCPStore looks up the name of every address it connects to; where the name server drops such questions
(IPv4-mapped addresses are in no hosts file) one connection in twelve takes 5 s. Here nothing is looked up, and a wait
can be aborted.

Server and client each send a nonce and show with an HMAC of both (RFC 2104) that they know the run's secret, which
never travels. Then a request is (operation, key size, value size), key, value; the answer is (size), value. A get is
answered once the key is there. Whoever cannot show it, asks before it was answered, or announces more than the limits
is disconnected.
"""

from __future__ import annotations

import errno
import hmac
import os
import resource
import secrets
import select
import selectors
import socket
import struct
import sys
import threading
import time
from collections import defaultdict

from elastic.collective.group import SLICE_S
from elastic.errors import GroupBroken

REQUEST, ANSWER = struct.Struct("!cII"), struct.Struct("!I")
SET, GET, CHECK = b"S", b"G", b"C"
NONCE, PROOF = 32, 32  # bytes
MAX_KEY, MAX_VALUE = 1 << 16, 1 << 22  # bytes: a thousand members' names in a key, their addresses in a value
# how long, and how many at a time, may be connected without having shown the secret
STRANGER_S, MAX_STRANGERS = 10.0, 256
REST_S = 0.05  # before the next try to accept where the process has no descriptor left
# after which the system asks a silent client's machine whether it is there, or gives up what it cannot send
SILENCE_S = 90
TRIES, AGAIN_S = 5, 0.05  # of a client that was disconnected as a stranger: the one that waits longest makes room


def proof(secret: str, whose: bytes, server: bytes, client: bytes) -> bytes:
    return hmac.digest(secret.encode(), whose + server + client, "sha256")


class Caller:
    """One connection to the server: what was received of its request, what its answer still lacks, and the key that it
    waits for."""

    def __init__(self, client: socket.socket):
        self.socket, self.until = client, time.monotonic() + STRANGER_S
        self.nonce, self.is_known = os.urandom(NONCE), False
        self.received, self.unsent, self.key = bytearray(), memoryview(b""), b""


class Endpoint:
    """This worker's server on a free port: any generation may meet here, under a prefix of its own. One question at a
    time a connection, so what it holds for each is bounded; its thread waits for nobody and outlives whatever comes in.
    """

    def __init__(self, host: str = "127.0.0.1", secret: str = ""):
        self._secret = secret or secrets.token_hex(16)
        self._socket = socket.create_server((host, 0), backlog=128)
        self._socket.setblocking(False)
        self.place = f"{host}:{self._socket.getsockname()[1]}"  # may be told to anybody
        self.address = f"{self._secret}@{self.place}"  # for members alone
        self._values: dict[bytes, bytes] = {}
        self._waiting: dict[bytes, list[Caller]] = defaultdict(list)
        self._callers: set[Caller] = set()
        self._strangers: dict[Caller, None] = {}  # the one that came first is the first
        self._over = (b"", 0)  # a run, and the oldest of its generations that counts
        self._rests_until, self._lock = 0.0, threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        threading.Thread(target=self._serve, name="elastic-store", daemon=True).start()

    def drop_before(self, run: str, generation: int) -> None:
        """Forgets the keys under RUN/N for every N below `generation`, and takes no more of them."""
        with self._lock:
            self._over = run.encode(), generation
            self._values = {key: value for key, value in self._values.items() if not self._is_over(key)}
            for key in [key for key in self._waiting if self._is_over(key)]:
                del self._waiting[key]  # who waits finds its generation aborted

    def _is_over(self, key: bytes) -> bool:
        run, _, rest = key.partition(b"/")
        number = rest.partition(b"/")[0]
        return run == self._over[0] and number.isdigit() and int(number) < self._over[1]

    def _serve(self) -> None:
        while True:
            found = self._selector.select(REST_S if self._rests_until else 1.0 if self._strangers else None)
            with self._lock:
                for key, events in found:
                    if key.data is None:
                        self._accept()
                    if events & selectors.EVENT_WRITE and key.data in self._callers:
                        self._send(key.data)
                    if events & selectors.EVENT_READ and key.data in self._callers:
                        self._receive(key.data)
                now = time.monotonic()
                for stranger in [s for s in self._strangers if s.until < now]:
                    self._forget(stranger)
                if self._rests_until and now > self._rests_until:
                    self._selector.register(self._socket, selectors.EVENT_READ)
                    self._rests_until = 0.0

    def _accept(self) -> None:
        try:
            client, _ = self._socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                for stranger in list(self._strangers):
                    self._forget(stranger)
                self._selector.unregister(self._socket)  # who asks meanwhile waits in the backlog
                self._rests_until = time.monotonic() + REST_S
            return
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sys.platform == "linux":  # elsewhere as long as the system waits
            for option, value in ((socket.TCP_KEEPIDLE, SILENCE_S), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3),
                                  (socket.TCP_USER_TIMEOUT, SILENCE_S * 1000)):
                client.setsockopt(socket.IPPROTO_TCP, option, value)
        caller = Caller(client)
        self._callers.add(caller)
        self._strangers[caller] = None
        self._selector.register(client, selectors.EVENT_READ, caller)
        self._send(caller, caller.nonce)
        # the worker needs some itself
        if len(self._strangers) > min(MAX_STRANGERS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4):
            self._forget(next(iter(self._strangers)))

    def _receive(self, caller: Caller) -> None:
        try:
            more = caller.socket.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            more = b""
        buffer = caller.received
        buffer += more
        if not more or caller.key or caller.unsent:  # gone, or it does not wait for its answer
            self._forget(caller)
        elif not caller.is_known:
            if len(buffer) >= NONCE + PROOF:
                self._admit(caller, bytes(buffer[:NONCE]), bytes(buffer[NONCE:]))
        elif len(buffer) >= REQUEST.size:
            operation, key_size, value_size = REQUEST.unpack_from(buffer)
            end = REQUEST.size + key_size + value_size
            if operation not in (SET, GET, CHECK) or key_size > MAX_KEY or value_size > MAX_VALUE or len(buffer) > end:
                self._forget(caller)
            elif len(buffer) == end:
                key, value = bytes(buffer[REQUEST.size:end - value_size]), bytes(buffer[end - value_size:])
                buffer.clear()
                self._do(caller, operation, key, value)

    def _admit(self, caller: Caller, nonce: bytes, shown: bytes) -> None:
        if not hmac.compare_digest(shown, proof(self._secret, b"client", caller.nonce, nonce)):
            self._forget(caller)
            return
        caller.is_known = True
        caller.received.clear()
        del self._strangers[caller]
        self._send(caller, proof(self._secret, b"server", caller.nonce, nonce))

    def _do(self, caller: Caller, operation: bytes, key: bytes, value: bytes) -> None:
        if operation == SET:
            if not self._is_over(key):
                self._values[key] = value
            self._answer(caller, b"")
            for waiter in self._waiting.pop(key, []):
                waiter.key = b""
                self._answer(waiter, value)
        elif operation == CHECK:
            self._answer(caller, b"1" if key in self._values else b"")
        elif key in self._values:
            self._answer(caller, self._values[key])
        else:
            caller.key = key
            self._waiting[key].append(caller)

    def _answer(self, caller: Caller, value: bytes) -> None:
        self._send(caller, ANSWER.pack(len(value)) + value)

    def _send(self, caller: Caller, more: bytes = b"") -> None:
        """As much as the client takes; the rest when it takes more."""
        waited, caller.unsent = bool(caller.unsent), caller.unsent if caller.unsent else memoryview(more)
        try:
            caller.unsent = caller.unsent[caller.socket.send(caller.unsent):]
        except BlockingIOError:
            pass
        except OSError:
            self._forget(caller)
            return
        if waited != bool(caller.unsent):
            self._selector.modify(caller.socket, selectors.EVENT_READ | (selectors.EVENT_WRITE if caller.unsent else 0),
                                  caller)

    def _forget(self, caller: Caller) -> None:
        if caller in self._callers:
            self._callers.discard(caller)
            self._strangers.pop(caller, None)
            if caller in self._waiting.get(caller.key, ()):
                self._waiting[caller.key].remove(caller)
                if not self._waiting[caller.key]:
                    del self._waiting[caller.key]
            self._selector.unregister(caller.socket)
            caller.socket.close()


class StoreClient:
    """One group's connection to the store at `address` (SECRET@host:port). Whatever goes wrong is `GroupBroken`."""

    def __init__(self, address: str, prefix: str, aborted: threading.Event, timeout_s: float):
        self._secret, _, self._place = address.rpartition("@")
        self._address, self._prefix, self._aborted, self._timeout_s = address, prefix, aborted, timeout_s
        self._lock = threading.Lock()
        self._what = f"Group {prefix}: the store at {self._place}"
        deadline = time.monotonic() + timeout_s
        for left in reversed(range(TRIES)):
            try:
                self._socket = self._reach(deadline)
            except OSError as error:
                raise GroupBroken(f"{self._what} cannot be reached: {error}.") from error
            try:
                self._greet(deadline)
                return
            except OSError as error:
                self._socket.close()
                if not left:
                    raise GroupBroken(f"{self._what} does not let this member in: {error}.") from error
            except GroupBroken:
                self._socket.close()
                raise
            self._aborted.wait(AGAIN_S)

    def _reach(self, deadline: float) -> socket.socket:
        """A connection; a wait for it can be aborted, as any other."""
        host, _, port = self._place.rpartition(":")
        reached = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            reached.setblocking(False)
            code = reached.connect_ex((host, int(port)))
            ready = select.poll()
            ready.register(reached, select.POLLOUT)
            while code in (0, errno.EINPROGRESS) and not ready.poll(SLICE_S * 1000):
                self._look("connection", deadline)
            code = reached.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if code in (0, errno.EINPROGRESS) else code
            if code:
                raise OSError(code, os.strerror(code))
            reached.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            reached.settimeout(SLICE_S)
            return reached
        except BaseException:
            reached.close()
            raise

    def _greet(self, deadline: float) -> None:
        mine, theirs = os.urandom(NONCE), self._receive(NONCE, "greeting", deadline)
        self._send(mine + proof(self._secret, b"client", theirs, mine), "greeting", deadline)
        if not hmac.compare_digest(self._receive(PROOF, "greeting", deadline),
                                   proof(self._secret, b"server", theirs, mine)):
            raise GroupBroken(f"{self._what} is another run's.")

    def clone(self) -> StoreClient:
        """Another connection with the same prefix."""
        return StoreClient(self._address, self._prefix, self._aborted, self._timeout_s)

    def set(self, key: str, value: bytes) -> None:
        self._ask(SET, key, value)

    def get(self, key: str) -> bytes:
        """The value, once there is one."""
        return self._ask(GET, key)

    def check(self, key: str) -> bool:
        return bool(self._ask(CHECK, key))

    def _ask(self, operation: bytes, key: str, value: bytes = b"") -> bytes:
        name = f"{self._prefix}/{key}".encode()
        if len(name) > MAX_KEY or len(value) > MAX_VALUE:
            raise GroupBroken(f"{self._what}: {key[:80]} with {len(value)} bytes is more than it takes.")
        with self._lock:
            try:
                deadline = time.monotonic() + self._timeout_s
                self._send(REQUEST.pack(operation, len(name), len(value)) + name + value, key, deadline)
                size = ANSWER.unpack(self._receive(ANSWER.size, key, deadline))[0]
                if size > MAX_VALUE:
                    raise GroupBroken(f"{self._what} answers with {size} bytes, more than {MAX_VALUE}.")
                return self._receive(size, key, deadline)
            except GroupBroken:
                self._socket.close()  # its answer may still come: nothing else may be asked here
                raise
            except OSError as error:
                raise GroupBroken(f"{self._what} is gone: {error}.") from error

    def _look(self, key: str, deadline: float) -> None:
        """In every slice of a wait."""
        if self._aborted.is_set():
            raise GroupBroken(f"{self._what}: waiting for {key} was aborted.")
        if time.monotonic() > deadline:
            raise GroupBroken(f"{self._what}: no {key} within {self._timeout_s:g} s.")

    def _send(self, data: bytes, key: str, deadline: float) -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[self._socket.send(left):]
            except TimeoutError:
                self._look(key, deadline)

    def _receive(self, size: int, key: str, deadline: float) -> bytes:
        found = bytearray()
        while len(found) < size:
            try:
                more = self._socket.recv(size - len(found))
            except TimeoutError:
                self._look(key, deadline)
                continue
            if not more:
                raise ConnectionResetError("it has closed the connection")
            found += more
        return bytes(found)
