"""A trainer's line to its daemon: a thread that owns the socket, so that no call from the training loop ever waits for it.

`tell` queues a notice and returns. `ask` waits for an answer, with a deadline, and is used outside the loop only (attach, restore, close).
When the daemon goes away, notices are dropped (a successor finds complete slots by itself), the thread tries to reach a successor, hands the
arena back and joins again; training does not notice.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any, TypeVar

from ckptd import errors
from ckptd.channel import Pipe, connect, peer_of
from ckptd.core import wire
from ckptd.errors import CkptdError, DaemonUnreachable, PeerFailed

log = logging.getLogger("ckptd.link")

CONNECT_TIMEOUT_S = 2.0
REJOIN_S = (0.05, 1.0)
"""First and longest pause between attempts to reach a successor."""
TELLS_MAX = 1024
"""Notices queued for a daemon that does not read: a SIGSTOPped one, for a thousand steps. Then the oldest go."""

Answer = TypeVar("Answer", bound=wire.Message)


class Link:
    """One connection at a time to the daemon at `path`, and the thread that keeps it."""

    def __init__(
        self, path: Path, hello: Callable[[int], wire.Hello], on_notice: Callable[[Any], None], *, retry_max_s: float = REJOIN_S[1]
    ) -> None:
        self._path = path
        self._retry_max_s = retry_max_s
        self._hello = hello
        self._on_notice = on_notice
        self._ids = itertools.count(1)
        self._waiting: dict[int, Future[tuple[Any, int | None]]] = {}
        self._tells: deque[tuple[wire.Message, int | None]] = deque(maxlen=TELLS_MAX)
        self._lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._rejoin: tuple[Callable[[int], wire.Request], int] | None = None
        self._renew = False
        self._on_connect: Callable[[int], None] | None = None
        self._chose: wire.Chose | None = None
        self._closing = False
        self._thread: threading.Thread | None = None
        self.connected = False
        self.reconnects = 0

    def open(self, timeout_s: float) -> wire.Welcome:
        """Connect and greet. Raises DaemonUnreachable."""
        pipe = connect(self._path, min(timeout_s, CONNECT_TIMEOUT_S))
        self.connected = True
        self._thread = threading.Thread(target=self._run, args=(pipe,), name="ckptd-link", daemon=True)
        self._thread.start()
        return self.ask(self._hello, wire.Welcome, timeout_s)[0]

    def start(self, on_connect: Callable[[int], None] | None = None) -> None:
        """Reach the daemon whenever there is one, and say what `rejoin_with` was given; returns at once. `on_connect(its pid)`: in the link's thread."""
        self._on_connect = on_connect
        self._thread = threading.Thread(target=self._begin, name="ckptd-tap", daemon=True)
        self._thread.start()

    def hurry(self) -> None:
        """A daemon may be there now: try at once."""
        self._kick()

    def renew(self) -> None:
        """Leave this connection, and greet anew."""
        self._renew = True
        self._kick()

    def again(self) -> None:
        """Say to this daemon again what `rejoin_with` was given."""
        if self._rejoin is not None:
            make, fd = self._rejoin
            self.tell(make(next(self._ids)), fd)

    def tell(self, message: wire.Message, fd: int | None = None) -> None:
        """Queue a notice; never waits, never raises. Without a connection it is dropped."""
        if isinstance(message, wire.Chose):
            self._chose = message  # a successor has to know it too: else it keeps what the restore gave up, for ever
        if self.connected:
            self._tells.append((message, fd))
            self._kick()

    def ask(self, make: Callable[[int], wire.Request], kind: type[Answer], timeout_s: float, fd: int | None = None) -> tuple[Answer, int | None]:
        """Send a request and wait for its answer, and the descriptor that came with it. Raises DaemonUnreachable, or what the daemon refused with."""
        number = next(self._ids)
        future: Future[tuple[Any, int | None]] = Future()
        with self._lock:
            self._waiting[number] = future
        self.tell(make(number), fd)
        try:
            if not self.connected:
                msg = "the daemon is gone"
                raise DaemonUnreachable(msg, remedy="`ckptd status` tells whether a new one is there")
            answer, got = future.result(timeout_s)
        except FutureTimeoutError as e:
            msg = f"the daemon at {self._path} did not answer within {timeout_s:.0f} s"
            raise DaemonUnreachable(msg, remedy="is it stopped? `ckptd status` tells") from e
        finally:
            with self._lock:
                self._waiting.pop(number, None)
        if isinstance(answer, wire.Refused):
            raise getattr(errors, answer.error, PeerFailed)(answer.message, remedy=answer.remedy)
        if not isinstance(answer, kind):
            msg = f"the daemon answered with {type(answer).__name__}, not {kind.__name__}"
            raise PeerFailed(msg)
        return answer, got

    def rejoin_with(self, join: Callable[[int], wire.Request], fd: int) -> None:
        """How to join a successor of this daemon: the request, and the descriptor to hand over (an arena, a ring)."""
        self._rejoin = join, fd

    def close(self) -> None:
        """Say what is queued, then hang up. Waits at most a second."""
        self._closing = True
        self._kick()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(1.0)

    def _kick(self) -> None:
        with contextlib.suppress(OSError, BlockingIOError):
            os.eventfd_write(self._wake, 1)

    # --- the thread ---------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._run(self._reconnect())

    def _run(self, pipe: Pipe | None) -> None:
        while pipe is not None:
            try:
                self._talk(pipe)
            except (EOFError, OSError, CkptdError) as e:
                log.debug("the daemon's line broke: %s", e)
            except Exception:  # whatever it is: a thread that ends would never connect again
                log.exception("the line to the daemon failed")
            self.connected = False
            self._tells.clear()
            pipe.close()
            self._fail_waiting()
            pipe = None if self._closing else self._reconnect()

    def _talk(self, pipe: Pipe) -> None:
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        while True:
            pipe.flush()
            while self._tells and not pipe.wants_write:  # what the socket does not take stays in the bounded queue
                pipe.put(*self._tells.popleft())
                pipe.flush()
            if (self._closing or self._renew) and not pipe.wants_write:
                self._renew = False
                return
            poller.register(pipe.sock, select.POLLIN | (select.POLLOUT if pipe.wants_write else 0))
            ready = {fd for fd, _ in poller.poll(1000)}
            if self._wake in ready:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            if pipe.sock.fileno() in ready:
                for message in pipe.read():
                    self._take(pipe, message)

    def _take(self, pipe: Pipe, message: Any) -> None:
        number = getattr(message, "id", 0)
        brings = isinstance(message, wire.Opened) or (isinstance(message, wire.Granted) and message.brings)
        fd = pipe.take_fd() if brings else None
        with self._lock:
            future = self._waiting.pop(number, None)
        if future is not None:
            future.set_result((message, fd))
            return
        if fd is not None:
            os.close(fd)
        if isinstance(message, wire.Refused) and self.reconnects:
            log.log(logging.WARNING if self._on_connect is None else logging.DEBUG, "the daemon refused to take this rank back: %s", message.message)
        if number == 0 or isinstance(message, wire.Watched):
            self._on_notice(message)

    def _fail_waiting(self) -> None:
        with self._lock:
            lost, self._waiting = self._waiting, {}
        for future in lost.values():
            future.set_exception(DaemonUnreachable("the daemon went away", remedy="`ckptd status` tells whether a new one is there"))

    def _reconnect(self) -> Pipe | None:
        """A pipe to a successor that has our arena back, or None when closing."""
        pause_s = REJOIN_S[0]
        while not self._closing:
            with contextlib.suppress(CkptdError, OSError, EOFError):
                pipe = connect(self._path, CONNECT_TIMEOUT_S)
                try:
                    pipe.put(self._hello(next(self._ids)))
                    if self._rejoin is not None:
                        join, fd = self._rejoin
                        pipe.put(join(next(self._ids)), fd)
                        if self._chose is not None:
                            pipe.put(self._chose)
                    self.connected = True  # before the join is sent: what is filled after the daemon looked is told
                    pipe.flush()
                except BaseException:
                    self.connected = False
                    pipe.close()
                    raise
                self.reconnects += 1
                if self._on_connect is not None:
                    self._on_connect(peer_of(pipe.sock)[0])
                else:
                    log.info("a daemon is back at %s: the arena was handed to it", self._path)
                return pipe
            if self._pause(pause_s):
                pause_s = REJOIN_S[0]
            pause_s = min(2 * pause_s, self._retry_max_s)
        return None

    def _pause(self, pause_s: float) -> bool:
        """Whether somebody said that it is time before it was over."""
        ready, _, _ = select.select([self._wake], [], [], pause_s)
        if ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            time.sleep(0.01)
        return bool(ready)
