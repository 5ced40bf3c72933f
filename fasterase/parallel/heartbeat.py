"""Signs of life between the ranks of a run, and the signals that one of them received.

Every rank has a connection to the first, over which both send a line now and then. The first rank
tells the others who is silent and who was told to stop.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fasterase.signals import StopRequest

log = logging.getLogger(__name__)

# Seconds without a sign of life after which a rank counts as lost.
LIMIT_SECONDS = 60.0
_BEAT_SECONDS = 0.5
_CONNECT_SECONDS = 10.0
_LEAVE_SECONDS = 2.0


class Heartbeat:
    """A thread that tells this rank who has fallen silent, and passes signals on."""

    def __init__(self, rank: int, sockets: dict[int, socket.socket], stop: StopRequest) -> None:
        self.limit = LIMIT_SECONDS
        self.silent: set[int] = set()  # ranks that gave no sign of life for longer
        self.stopping: dict[int, int] = {}  # rank -> signal that it received
        self.on_silence: Callable[[], None] = lambda: None
        self._rank, self._stop = rank, stop
        self._peers = sockets
        self._rest = dict.fromkeys(sockets, b"")  # of a line that has not come whole
        self._missed = dict.fromkeys(sockets, 0.0)
        self._told: dict[int, set[int]] = {}  # peer -> ranks that it knows to be stopping
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Tell the others that this rank stops, and wait a moment until they know."""
        until = time.monotonic() + _LEAVE_SECONDS
        while time.monotonic() < until and self._thread.is_alive():
            if all(self._rank in self._told.get(peer, ()) for peer in list(self._peers)):
                return
            time.sleep(0.02)

    def close(self) -> None:
        """End the thread and the connections."""
        self._ending.set()
        self._thread.join()
        for peer in self._peers.values():
            peer.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            beat = 0.0
            while not self._ending.is_set():
                for key, _ in selector.select(0.1):
                    if not self._receive(key.data):
                        selector.unregister(key.fileobj)
                        self._peers.pop(key.data).close()
                is_new = self._stop.number and self._rank not in self.stopping
                now = time.monotonic()
                if is_new or now - beat >= _BEAT_SECONDS:
                    # Counted in beats of its own: a run that was suspended as a whole goes on.
                    self._beat(min(now - beat, 2 * _BEAT_SECONDS))
                    beat = now

    def _receive(self, rank: int) -> bool:
        """Read what a peer has sent; return whether it is still there."""
        try:
            data = self._peers[rank].recv(1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if data:
            self._missed[rank] = 0.0
        *lines, self._rest[rank] = (self._rest[rank] + data).split(b"\n")
        for line in lines:
            # Cut off while the peer was stopped; each line tells all anew.
            with suppress(ValueError, TypeError, KeyError):
                said = json.loads(line)
                self.silent |= set(said["silent"]) - {self._rank}
                stopping = {int(each): number for each, number in said["stopping"].items()}
                self._told[rank] = set(stopping)
                self.stopping = stopping | self.stopping
        return bool(data)

    def _beat(self, seconds: float) -> None:
        """Send a line to the peers, and look at what is known of them."""
        if self._stop.number:
            self.stopping = self.stopping | {self._rank: self._stop.number}
        for rank in self._peers:
            self._missed[rank] += seconds
            if self._missed[rank] > self.limit and rank not in self.stopping:
                self.silent.add(rank)
        line = json.dumps({"silent": sorted(self.silent), "stopping": self.stopping}) + "\n"
        for peer in self._peers.values():
            with suppress(OSError):  # of a stopped one, the buffer may be full
                peer.send(line.encode())
        if self.stopping:
            self._stop.pass_on(next(iter(self.stopping.values())))
        if self.silent:
            self.on_silence()


def connect(
    rank: int,
    hosts: list[str],  # of the ranks
    exchange: Callable[[Any], list[Any]],  # gathers an object of each rank
) -> dict[int, socket.socket] | None:
    """Connect the first rank with all others; None, on all, if that cannot be done."""
    is_local = len(set(hosts)) == 1
    found: dict[int, socket.socket] = {}
    server, offer = None, None
    with suppress(OSError):
        if rank == 0:
            server = socket.create_server(("127.0.0.1" if is_local else "", 0), backlog=len(hosts))
            offer = (server.getsockname()[1], secrets.token_hex())
    first = exchange(offer)[0]
    if first is not None:
        port, token = first
        host = "127.0.0.1" if is_local else os.environ.get("MASTER_ADDR") or hosts[0]
        with suppress(OSError):
            if server is not None:
                found = _accept(server, token, len(hosts) - 1)
            else:
                found[0] = socket.create_connection((host, port), timeout=_CONNECT_SECONDS)
                found[0].sendall(f"{token} {rank}\n".encode())
    if server is not None:
        server.close()
    if not all(exchange(len(found) == (len(hosts) - 1 if rank == 0 else 1))):
        for each in found.values():
            each.close()
        if rank == 0:
            log.warning(
                "The ranks cannot reach the first one on %s: a rank that hangs will be noticed "
                "after two hours only.",
                hosts[0],
            )
        return None
    for each in found.values():
        each.setblocking(False)
    return found


def _accept(server: socket.socket, token: str, count: int) -> dict[int, socket.socket]:
    """Accept the connections of `count` ranks that know the token."""
    found: dict[int, socket.socket] = {}
    until = time.monotonic() + _CONNECT_SECONDS
    while len(found) < count and (left := until - time.monotonic()) > 0:
        server.settimeout(left)
        peer, _ = server.accept()
        peer.settimeout(_CONNECT_SECONDS)
        said: list[str] = []
        with suppress(OSError), peer.makefile("rb") as lines:
            said = lines.readline(256).decode("ascii", "replace").split()
        if len(said) == 2 and secrets.compare_digest(said[0], token):
            found[int(said[1])] = peer
        else:
            peer.close()
    return found
