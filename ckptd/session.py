"""The session: ckptd in the training loop.

    session = ckptd.attach(model=model, optimizer=optimizer, extras={"scheduler": sched, "loader": loader})
    start = session.restore().step
    for step in range(start + 1, total + 1):
        ...
        optimizer.step()
        session.step(step)
    session.close()

`attach` and `restore` are collective: every rank of the job calls them, in the same order; they wait for each other and for the daemon, with
deadlines. `step` is not: it takes what is free, hands the copying to the copier and returns. Whatever is wrong with the daemon - absent, dead,
stopped, full, slow - costs snapshots, which are counted by reason in `status()`, never a step.
"""

from __future__ import annotations

import atexit
import logging
import operator
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, replace
from typing import Any, Self

import msgspec
import torch
from torch import nn
from torch.optim import Optimizer

from ckptd import restore as restoring
from ckptd import rounds, spawn, state, tapline
from ckptd.arena import Arena
from ckptd.binding import Binding, encode_objects
from ckptd.capture import FAILED, Capture, copier_for, copy_batch, hash_of, pin, unpin
from ckptd.channel import socket_path
from ckptd.core import groups, replicas, slots, wire
from ckptd.core.boxes import Box
from ckptd.core.image import Layout, Piece
from ckptd.core.ladder import Durable, Rung
from ckptd.core.plan import LeafDecl
from ckptd.errors import (
    BadArgument,
    Bug,
    CkptdError,
    DaemonUnreachable,
    NotFound,
    NotRestored,
    StoreFailed,
)
from ckptd.link import Link
from ckptd.meeting import Meeting, meeting_of
from ckptd.monitor import record, tap
from ckptd.state import Leaf, TrainState
from ckptd.storage import absolute, checkpoint, open_store
from ckptd.wanted import Asker, Wanted

log = logging.getLogger("ckptd")

SLOTS_DEFAULT = 3
"""One committed, one on its way, one to fill: two would skip a step whenever the commit takes longer than the step's rest."""
KEEPER_S = 5.0
"""A launcher's keeper notices a dead daemon at once and needs about half a second to start another."""
EXIT_S = 5.0
"""What an interpreter that ends without `close` gives the last snapshot."""
PATIENCE_S = 0.2
"""How long a step that is due to be persisted waits for a slot. Others never wait; but where steps are so short that some are skipped, the one
that was to be kept, perhaps the last, must not be among them by chance."""
POPULATE_BYTES_PER_S = 5e8
SLACK_BYTES = 1 << 20
"""Added to each slot, so that objects may grow (a data loader's position, a scheduler's list) without a new arena."""

Look = Callable[[int], TrainState]
"""A rank's own way to find its state (`integrations`): one name may have several leaves, with a box each."""
ModelArg = nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]
OptimizerArg = Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `attach` was told, after the environment filled the gaps."""

    job: str
    store: str = ""
    """Durable tier: a path or URL; "" for none."""
    persist_every: int = 0
    """Persist every n-th step; 0: only on `persist()`."""
    slots: int = 0
    """Snapshots per rank in memory; 0: SLOTS_DEFAULT, and one more where nodes protect each other."""
    parity: int = groups.PARITY_DEFAULT
    """How many nodes of a group may be lost; 0: nodes do not protect each other."""
    group_size: int = groups.SIZE_DEFAULT
    check_replicas_every: int = replicas.EVERY
    """What several ranks hold identically is compared once within so many steps, a share in each; 0: never."""
    keep_newest: int = 2
    keep_every: int = 0
    local: tuple[str, ...] = ()
    """Patterns of tensor names that each rank has for itself."""
    paranoid: bool = False
    """Hash every source before and after its copy."""
    directory: str | None = None
    """Where the daemon's socket lies."""
    start_daemon: bool = True
    kept: bool = False
    """A launcher looks after the daemon: it gets a moment to bring back one that died, with the arenas."""
    required: bool = False
    """Raise where the default is to train on without snapshots."""
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        checkpoint.check_job(self.job)
        if self.parity:
            groups.check(self.group_size, self.parity)
        if self.slots and not slots.SLOTS_MIN <= self.slots <= slots.SLOTS_MAX:
            msg = f"slots={self.slots}: a rank has {slots.SLOTS_MIN} to {slots.SLOTS_MAX} slots"
            raise BadArgument(msg)
        if min(self.persist_every, self.keep_every, self.check_replicas_every) < 0 or self.timeout_s <= 0 or self.keep_newest < 1:
            msg = "persist_every, keep_every and check_replicas_every must not be negative, keep_newest at least 1, timeout_s above 0"
            raise BadArgument(msg)
        if self.persist_every and not self.store:
            msg = "persist_every needs a durable tier"
            raise BadArgument(msg, remedy="give store=..., or CKPTD_STORE, or ckptd run --store")


@dataclass(frozen=True)
class Restored:
    """What a restore did. `source`: "memory", a directory of the durable tier, or "fresh"."""

    step: int
    source: str
    attempt: int = 0
    seconds: float = 0.0
    bytes: int = 0
    """Bytes of tensors filled on this rank."""
    warnings: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


class Session:
    """One rank's session. Methods are for the thread that trains; `status` may be called from any."""

    def __init__(
        self,
        settings: Settings,
        models: Sequence[tuple[str, nn.Module]],
        optimizers: Sequence[tuple[str, Optimizer]],
        extras: Mapping[str, Any],
        meeting: Meeting,
        look: Look | None = None,
    ) -> None:
        self.settings = settings
        self.rank, self.world_size = meeting.rank, meeting.world_size
        self.attempt = 0
        self.counts: Counter[str] = Counter()
        self.inert = ""
        """Why no snapshots are taken, if so."""
        self._meeting = meeting
        self._models, self._optimizers, self._extras, self._looking = models, optimizers, extras, look
        self._reached: dict[str, tuple[int, int]] = {}
        self._condition = threading.Condition()
        self._link = Link(socket_path(settings.directory), self._hello, self._on_notice)
        self._arena: Arena | None = None
        self._layout: Layout | None = None
        self._restored = False
        self._closed = False
        self._torn: set[str] = set()
        self._last: tuple[int, int] | None = None
        self._timings: dict[str, float] = {}
        self._pinned = False
        self._place = rounds.Place(0, "", 0, 1, [""], [])
        self._taken: int | None = None
        self._fences = self._fences_before = 0
        self._said: set[str] = set()
        self._complete = True
        self._join_timeout_s = settings.timeout_s
        self._hooks: list[Any] = []
        self._persist_asked: int | None = None

    # --- attach -------------------------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        self._look()
        arrival = self._arrive()
        place = self._meeting.round("attach", msgspec.msgpack.encode(arrival), rounds.gather, self.settings.timeout_s)
        self._place = msgspec.msgpack.decode(place, type=rounds.Place)
        self.attempt = self._place.attempt
        tapline.ensure(self.settings.job, self.attempt, self.settings.directory)
        self._copier = copier_for([t for leaf in self._train.leaves if (t := leaf.resolve()) is not None])
        self._hooks = [
            hook
            for _, o in self._optimizers
            for hook in (o.register_step_pre_hook(self._fence), o.register_load_state_dict_pre_hook(self._fence))
        ]
        self._plan()
        if self._place.no_daemon:
            self._go_inert(self._place.no_daemon)
        atexit.register(_at_exit, weakref.ref(self), os.getpid())

    def _look(self) -> None:
        """Find the state, and try to encode its objects. An error is kept for the meeting, so that every rank hears it."""
        self._error: CkptdError | None = None
        self._train = TrainState(coords={"rank": self.rank})
        try:
            if self._looking is not None:
                self._train = self._looking(self.rank)
            else:
                self._train = state.look(self._models, self._optimizers, self._extras, local=self.settings.local, rank=self.rank)
            encode_objects(self._train.objects, self.rank)
        except CkptdError as e:
            self._error = e

    def _arrive(self) -> rounds.Arrival:
        arrival = rounds.Arrival()
        if self._error is not None:
            e = self._error
            arrival.error, arrival.message, arrival.remedy = type(e).__name__, f"rank {self.rank}: {e.message}", e.remedy
            return arrival
        try:
            welcome = self._reach_daemon()
            arrival.daemon, arrival.address = welcome.daemon, welcome.peer_address
            arrival.attempt_max, arrival.holdings, arrival.failed = welcome.attempt_max, welcome.holdings, welcome.failed
            arrival.labels = welcome.labels
        except (CkptdError, OSError) as e:
            arrival.no_daemon = f"rank {self.rank}: {e}"
        if self.rank == 0 and self.settings.store:
            try:
                found = _in_time(
                    lambda: checkpoint.list_checkpoints(open_store(self.settings.store), self.settings.job), self.settings.timeout_s / 2
                )
            except CkptdError as e:
                arrival.broken = [f"{self.settings.store}: {e.message}"]  # memory may do; if it does not, restore says this
                return arrival
            arrival.durable = [
                Durable(f.manifest.attempt, f.step, f.manifest.world_size, f.directory) for f in found if f.ok and f.manifest is not None
            ]
            arrival.broken = [f"{f.directory}: {f.error}" for f in found if not f.ok and not f.unfinished]
        return arrival

    def _reach_daemon(self) -> wire.Welcome:
        """The daemon's welcome. Where nobody listens one is started; one that listens and does not answer (stopped, hung) is not replaced."""
        try:
            return self._link.open(self.settings.timeout_s / 2)
        except DaemonUnreachable as e:
            path = socket_path(self.settings.directory)
            if not self.settings.start_daemon or not isinstance(e.__cause__, FileNotFoundError | ConnectionRefusedError):
                raise
            kept = self.settings.kept and spawn.is_up(path, KEEPER_S)
            if not kept and os.environ.get("LOCAL_RANK", "0") == "0":
                log.warning("no daemon at %s: starting one for this node", path)
                spawn.leave(spawn.start_daemon(self.settings.directory))
            spawn.await_socket(path, self.settings.timeout_s / 4)
            return self._link.open(self.settings.timeout_s / 4)

    def _plan(self) -> None:
        """Collective: who stores what, and memory for it. Again when the state's composition changed."""
        t = self._train
        error = self._error
        told = rounds.Told(
            error=type(error).__name__ if error else "",
            message=f"rank {self.rank}: {error.message}" if error else "",
            remedy=error.remedy if error else "",
            leaves=[self._declare(leaf) for leaf in t.leaves],
            coords=t.coords,
            objects=[o.name for o in t.objects],
            complete=t.complete,
        )
        planned = self._meeting.round("plan", msgspec.msgpack.encode(told), rounds.plan_for_all, self.settings.timeout_s)
        mine, names, mesh, self._complete, shared = msgspec.msgpack.decode(
            planned, type=tuple[list[rounds.PieceMessage], list[str], str, bool, list[str]]
        )
        self._replicas = self._in_turns({*shared})
        pieces = [Piece(p.name, p.dtype, p.shape, Box(*p.box), p.view) for p in mine]
        job = self.settings.job
        self._binding = Binding(pieces, self._train, job=job, rank=self.rank, world_size=self.world_size, torn=self._torn)
        self._binding.use(self._arena)
        self._asker = Asker(job, self.rank, self.world_size, mesh, frozenset(names))
        if self._place.no_daemon or self.inert:
            return
        trouble = self._join()
        outcome = self._meeting.round("join", trouble.encode(), rounds.first_trouble, self._join_timeout_s).decode()
        if outcome:
            self._go_inert(outcome)

    def _in_turns(self, names: set[str]) -> dict[int, list[tuple[str, Leaf]]]:
        """What other ranks hold too, by the step (modulo) in which it is compared. What may change at any time is not."""
        turns: dict[int, list[tuple[str, Leaf]]] = {}
        for leaf in self._train.leaves if self.settings.check_replicas_every else ():
            if leaf.name in names and not leaf.eager:
                key = replicas.key_of(leaf.name, leaf.box)
                turns.setdefault(replicas.turn_of(key, self.settings.check_replicas_every), []).append((key, leaf))
        return turns

    def _declare(self, leaf: Leaf) -> LeafDecl:
        """`digest` only where sharing is an assumption, and only of what exists."""
        live = leaf.resolve() if leaf.assumed and not leaf.local and self.world_size > 1 else None
        digest = b"" if live is None else hash_of(live).to_bytes(8, "little")
        return LeafDecl(leaf.name, leaf.dtype, leaf.shape, ((leaf.box.start, leaf.box.extent),), leaf.view, digest, leaf.local)

    def _join(self) -> str:
        """Ask the daemon for memory; why not, if so."""
        layout = self._layout = self._binding.lay_out(*encode_objects(self._train.objects, self.rank))
        needed = layout.image_bytes + layout.header_bytes + SLACK_BYTES
        if self._arena is not None and self._arena.geometry.slot_bytes >= needed:
            return ""
        try:
            # Memory is handed out populated: about 2 s per GB on a slow machine, for all ranks of the node.
            self._join_timeout_s = self.settings.timeout_s + needed * self._slots * self._place.local_count / POPULATE_BYTES_PER_S
            granted, fd = self._link.ask(lambda i: self._join_request(i, needed), wire.Granted, self._join_timeout_s)
            if fd is None:
                msg = "the daemon granted memory and sent none"
                raise Bug(msg)
            arena = Arena.adopt(fd)
        except CkptdError as e:
            return f"rank {self.rank}: {e.message}" + (f" ({e.remedy})" if e.remedy else "")
        if granted.note:
            log.warning("rank %d: %s", self.rank, granted.note)
        arena.populate()
        self._let_go()
        self._arena = arena
        self._pinned = pin(arena.memory)
        self._binding.use(arena)
        self._link.rejoin_with(lambda i: self._join_request(i, 0), arena.fd)
        if self.rank == 0:
            log.info(
                "job %s attempt %d: %d ranks on %d nodes; rank 0 has %d slots of %.1f MB for an image of %.1f MB",
                self.settings.job, self.attempt, self.world_size, len(self._place.peers), granted.slots,
                granted.slot_bytes / 1e6, layout.image_bytes / 1e6,
            )  # fmt: skip
        return ""

    def _join_request(self, number: int, image_bytes: int) -> wire.Join:
        s, p = self.settings, self._place
        return wire.Join(
            id=number, job=s.job, attempt=self.attempt, rank=self.rank, world_size=self.world_size, local_count=p.local_count,
            node=p.node, peers=p.peers, image_bytes=image_bytes, slots=self._slots, store=s.store,
            keep_newest=s.keep_newest, keep_every=s.keep_every, parity=s.parity, group_size=s.group_size, labels=p.labels,
            protected=self._reached.get("protected"), secret=p.secret,
        )  # fmt: skip

    @property
    def _slots(self) -> int:
        protects = self.settings.parity > 0 and len(self._place.peers) > 1
        return self.settings.slots or SLOTS_DEFAULT + protects

    def _hello(self, number: int) -> wire.Hello:
        return wire.Hello(id=number, job=self.settings.job, rank=self.rank)

    def _go_inert(self, why: str) -> None:
        self.inert = why
        if self.settings.required:
            raise DaemonUnreachable(why, remedy="start a daemon, or attach(required=False) to train without snapshots")
        if self.rank == 0:
            log.error("training goes on WITHOUT snapshots: %s", why)

    # --- the step -----------------------------------------------------------------------------------------------------------

    def step(self, step: int, *, loss: Any = None, grad_norm: Any = None) -> None:
        """Snapshot the state as it is after this step's update; returns at once. Call it after `optimizer.step()`, on every rank.

        `loss`, `grad_norm`: to have one that is no number noticed. Raises NotRestored if snapshots of this job exist and `restore` was not called; nothing else for ckptd's own reasons.
        """
        step = operator.index(step)
        due = self.settings.persist_every > 0 and step % self.settings.persist_every == 0
        if loss is not None or grad_norm is not None:
            tap.report_loss(loss, grad_norm)
        try:
            with tap.interval(record.CHECKPOINT):
                self._take(step, patient=due)
            if due:
                self.persist(step)
        finally:
            tap.stepped(step)

    snapshot = step

    def _take(self, step: int, *, patient: bool) -> bool:
        began_s = time.perf_counter()
        if not self._restored:
            self._begin_unrestored()
        if self.inert or self._arena is None or self._closed:
            self._skip(step, "no daemon")
            return False
        if self._taken is not None and step <= self._taken:
            if self.counts["skipped: step went back"] == 0:
                log.error("step %d after step %d: numbers must grow, so this is not captured; to go back, attach again", step, self._taken)
            self._skip(step, "step went back")
            return False
        self._taken = step
        self._copier.fence()
        if not self._complete and not self._complete_plan():
            return False
        slot = self._free_slot()
        until_s = began_s + PATIENCE_S
        while slot is None and patient and self._link.connected and time.perf_counter() < until_s:
            time.sleep(0.001)
            slot = self._free_slot()
        if slot is None:
            self._skip(step, "no free slot" if self._link.connected else "daemon gone")
            return False
        try:
            self._fill(step, slot)
        except Exception as e:
            # Whatever goes wrong here, a bug of ours included, costs this snapshot and not the user's step; it is logged and counted.
            self._void(slot)
            self._skip(step, type(e).__name__)
            if str(e) not in self._said:
                self._said.add(str(e))
                log.warning("step %d was not captured: %s", step, e, exc_info=not isinstance(e, CkptdError))
            return False
        except BaseException:
            self._void(slot)
            raise
        if self._fences == self._fences_before and self.counts["captured"]:
            self._unfenced()
        self._fences_before = self._fences
        self._timings["step_s"] = time.perf_counter() - began_s
        return True

    def _unfenced(self) -> None:
        """No optimizer hook ran since the last step (a captured CUDA graph, an engine of its own): the fence cannot be relied upon, so copy now."""
        if self.counts["unfenced"] == 0:
            log.warning("no optimizer that was given to attach has stepped since the last snapshot: copies are waited for from now on")
        self.counts["unfenced"] += 1
        self._copier.join()

    def _begin_unrestored(self) -> None:
        if self._place.rungs:
            newest = self._place.rungs[0]
            msg = f"step {newest.step} of job {self.settings.job!r} is there ({newest.source}), and the loop did not restore it"
            raise NotRestored(msg, remedy="call session.restore() before the loop, or session.restore(fresh=True) to start from scratch")
        if self._place.broken:
            msg = f"job {self.settings.job!r} has checkpoints that cannot be read, and the loop asked for nothing: {'; '.join(self._place.broken[:3])}"
            raise NotRestored(msg, remedy="`ckptd verify` says what is wrong; session.restore(fresh=True) starts from scratch")
        self._chose(None)

    def _complete_plan(self) -> bool:
        """The optimizer could not be asked for its state before its first step: it has taken it, so plan now (collective, once)."""
        self._look()
        why = ""
        try:
            self._plan()
            if not self._complete:
                why = "an optimizer's state cannot be known, even after a step"
        except CkptdError as e:
            why = str(e)
        if why:
            self.inert = why
            log.error("training goes on WITHOUT snapshots: %s", why)
        return not self.inert

    def _free_slot(self) -> int | None:
        arena = self._arena
        if arena is None:
            return None
        for slot in range(arena.geometry.slots):
            if slots.is_free(arena.header(slot), arena.seal(slot).released_gen):
                return slot
        return None

    def _fill(self, step: int, slot: int) -> None:
        arena = self._arena
        if arena is None:
            msg = "no arena"
            raise Bug(msg)
        objects, arrays = encode_objects(self._train.objects, self.rank)
        layout, bound = self._binding.bound(slot, objects, arrays)
        if bound.absent:
            objects["absent"] = {"policy": "absent", "value": [*bound.absent]}
        try:
            head = layout.render(attempt=self.attempt, step=step, objects=objects)
        except OverflowError:  # the objects have grown: make room in the header, once
            self._binding.forget()
            layout, bound = self._binding.bound(slot, objects, arrays)
            head = layout.render(attempt=self.attempt, step=step, objects=objects)
        header = arena.header(slot)
        seal = arena.seal(slot)
        at = arena.geometry.header_at(slot)
        gen = max(header.gen, seal.gen, seal.released_gen) + 1
        p = self._place
        slots.begin(
            arena.memory, at,
            slots.Header(
                slots.FILLING, gen, self.attempt, step, layout.image_bytes, self.rank, self.world_size, p.local_count, p.node, len(p.peers)
            ),
        )  # fmt: skip
        image = arena.image(slot, layout.image_bytes)
        image[: layout.header_bytes] = head
        with torch.no_grad():
            places = {e.piece.name: self._binding.at(slot, layout, e) for e in layout.entries if e.piece.name in arrays}
            copy_batch([*places.values()], [arrays[n] for n in places])
            copy_batch([d for _, d, _ in bound.eager], [s for _, _, s in bound.eager])
        flip_at, key = at, (self.attempt, step)

        def finish(torn: list[str]) -> None:
            if torn:
                self._tear(slot, step, torn)
                return
            slots.flip(arena.memory, flip_at, slots.FILLED)
            self._last = key
            self.counts["captured"] += 1
            self._link.tell(wire.Filled(step=step, slot=slot, gen=gen, replicas=capture.hashes))

        lazy = bound.lazy
        sources, places_, names = [s for _, _, s in lazy], [d for _, d, _ in lazy], [leaf.name for leaf, _, _ in lazy]
        due = self._replicas.get(step % max(1, self.settings.check_replicas_every), ())
        compared = [(key, state.local_of(live)) for key, leaf in due if leaf.name not in self._torn and (live := leaf.resolve()) is not None]
        capture = Capture(sources, places_, names, bound.cut, finish, self.settings.paranoid, compared)
        self._copier.start(capture)

    def _tear(self, slot: int, step: int, torn: list[str]) -> None:
        """Copier's thread: something wrote while it was copied. The image is void; what moved is eager from now on."""
        self._void(slot)
        self.counts["torn"] += 1
        new = [n for n in torn if n not in self._torn and n != FAILED]
        if new:
            self._torn.update(new)
            self._binding.forget()
            log.warning("step %d: %s changed outside optimizer.step while it was copied: captured eagerly from now on", step, ", ".join(new[:5]))
        self._skip(step, "torn")

    def _void(self, slot: int) -> None:
        if self._arena is not None:
            slots.flip(self._arena.memory, self._arena.geometry.header_at(slot), slots.VOID)

    def _skip(self, step: int, reason: str, *, tell: bool = True) -> None:
        self.counts["skipped"] += 1
        self.counts[f"skipped: {reason}"] += 1
        if tell:
            self._link.tell(wire.Skipped(step=step, reason=reason))

    def _fence(self, *_args: Any) -> None:
        began_s = time.perf_counter()
        self._fences += 1
        with tap.interval(record.CHECKPOINT):
            self._copier.fence()
        self._timings["fence_s"] = time.perf_counter() - began_s

    # --- restore ------------------------------------------------------------------------------------------------------------

    def restore(self, *, step: int | None = None, strict: bool = True, fresh: bool = False, timeout_s: float = 120.0) -> Restored:
        """Fill model, optimizers and extras from the newest step that can be had, the same on all ranks. Collective.

        `step`: this one and no other. `fresh`: start from scratch although snapshots exist. `strict=False`: leave missing keys as they are.
        Without any snapshot it returns step 0. Raises StateMismatch (keys, by name), NotFound (no such step), and, when snapshots exist and none
        of them could be restored, the newest one's error: never a silent start from scratch.
        """
        with tap.interval(record.RESTORE):
            return self._restore(step=step, strict=strict, fresh=fresh, timeout_s=timeout_s)

    def _restore(self, *, step: int | None, strict: bool, fresh: bool, timeout_s: float) -> Restored:
        began_s = time.perf_counter()
        if self._taken is not None:
            msg = f"restore after step {self._taken} was taken: this attempt's snapshots are newer"
            raise BadArgument(msg, remedy="close this session and attach again to go back")
        ladder = [] if fresh else [r for r in self._place.rungs if step in {None, r.step}]
        if step is not None and not ladder:
            have = sorted({r.step for r in self._place.rungs})
            msg = f"step {step} of job {self.settings.job!r} is not to be had; there are {have}"
            raise NotFound(msg)
        failures: list[str] = [] if fresh else [*self._place.broken]
        for number, rung in enumerate(ladder):
            outcome = self._try(number, rung, strict=strict, timeout_s=timeout_s)
            if isinstance(outcome, Restored):
                self._restored = True
                self._chose(rung)
                took_s = time.perf_counter() - began_s
                log.info("rank %d: step %d restored from %s in %.2f s", self.rank, outcome.step, outcome.source, took_s)
                if self.settings.parity and len(self._place.peers) > 1:
                    self._take(outcome.step, patient=True)  # redundancy among the nodes of this attempt, before its first step is done
                return replace(outcome, seconds=took_s)
            failures.append(f"step {rung.step} from {rung.source}: {outcome}")
            self._link.tell(wire.RestoreFailed(attempt=rung.attempt, step=rung.step, source=rung.source, why=outcome))
            log.error("step %d could not be restored from %s: %s", rung.step, rung.source, outcome)
        if failures:
            msg = f"none of {len(failures)} snapshots could be restored: " + "; ".join(failures[:8])
            raise NotFound(msg, remedy="`ckptd verify` says what is wrong; restore(fresh=True) starts from scratch")
        self._restored = True
        self._chose(None)
        return Restored(0, "fresh", seconds=time.perf_counter() - began_s)

    def _chose(self, rung: Rung | None) -> None:
        self._restored = True
        in_memory = rung is not None and not rung.directory
        key = rung.key if rung is not None and in_memory else (-1, -1)
        guarded_key = self._place.guarded
        protected = guarded_key if guarded_key is not None and guarded_key <= key else None
        self._link.tell(wire.Chose(attempt=key[0], step=key[1], protected=protected))

    def _try(self, number: int, rung: Rung, *, strict: bool, timeout_s: float) -> Restored | str:
        """One rung: stage, meet, apply. Returns why it failed, the same on all ranks, or raises what is the caller's to mend."""
        source: restoring.Source | None = None
        brought = rounds.Staging()
        work: Wanted | None = None
        try:
            source = self._open(rung, timeout_s)
            work = Wanted(self._train, self._asker, source.index, strict=strict)
            staged = restoring.stage(source, work.wants, work.array_wants, mine=self.rank)
            work.decode(staged.arrays)
            brought.unexpected = work.unexpected
        except CkptdError as e:
            brought.error, brought.message, brought.remedy = type(e).__name__, f"rank {self.rank}: {e.message}", e.remedy
        except OSError as e:
            brought.error, brought.message = "StoreFailed", f"rank {self.rank}: {e}"
        except Exception as e:  # the other ranks must hear of it, whatever it is
            log.exception("staging step %d failed", rung.step)
            brought.error, brought.message = "Bug", f"rank {self.rank}: {type(e).__name__}: {e}"
        try:
            decision = self._meeting.round(f"restore-{number}", msgspec.msgpack.encode(brought), rounds.all_staged, timeout_s).decode()
            if decision or source is None or work is None:
                return decision
            cores = len(os.sched_getaffinity(0)) // self._place.local_count
            work.create()
            filled = restoring.apply(staged, work.target, max(1, cores))
            work.finish()
            return Restored(
                rung.step, rung.source, rung.attempt, bytes=filled, warnings=tuple(work.warnings),
                missing=tuple(work.missing), unexpected=tuple(work.unexpected),
            )  # fmt: skip
        finally:
            del work
            staged = None  # type: ignore[assignment]  # views into the mappings must be gone before they are closed
            if source is not None:
                source.close()

    def _open(self, rung: Rung, timeout_s: float) -> restoring.Source:
        if rung.directory:
            return restoring.StoreSource(open_store(self.settings.store), rung.directory, self._free_areas())
        return restoring.MemorySource(self._link, self.settings.job, rung, self._arena, self._layout, timeout_s)

    def _free_areas(self) -> list[memoryview]:
        """The memory of free slots: populated, and nobody's until the first step after this restore."""
        arena = self._arena
        if arena is None:
            return []
        free = [s for s in range(arena.geometry.slots) if slots.is_free(arena.header(s), arena.seal(s).released_gen)]
        return [arena.image(s, arena.geometry.slot_bytes) for s in free]

    # --- the rest of the face -----------------------------------------------------------------------------------------------

    def persist(self, step: int) -> None:
        """Have the newest committed snapshot at or after `step` written to the durable tier, by the daemon; returns at once."""
        if not self.settings.store:
            msg = "persist needs a durable tier"
            raise BadArgument(msg, remedy="give attach(store=...), or CKPTD_STORE, or ckptd run --store")
        self._persist_asked = step
        self._link.tell(wire.Persist(step=step))

    def wait(self, what: str, step: int | None = None, *, timeout_s: float) -> bool:
        """Wait until a snapshot at or after `step` (default: the last one taken) is "committed", "protected" or "persisted"; False at the deadline."""
        if what not in {"committed", "protected", "persisted"}:
            msg = f"wait({what!r}): a snapshot is waited for until it is 'committed', 'protected' or 'persisted'"
            raise BadArgument(msg)
        self._copier.join()
        wanted = self._last if step is None else (self.attempt, step)
        if wanted is None:
            return False
        with self._condition:
            return self._condition.wait_for(lambda: self._reached.get(what, (-1, -1)) >= wanted, timeout_s)

    def status(self) -> dict[str, Any]:
        """Counters, timings and states, as plain values."""
        return {
            "job": self.settings.job,
            "attempt": self.attempt,
            "rank": self.rank,
            "world_size": self.world_size,
            "inert": self.inert,
            "connected": self._link.connected,
            "reconnects": self._link.reconnects,
            "counts": dict(self.counts),
            "timings_s": dict(self._timings),
            "reached": {k: v[1] for k, v in self._reached.items()},
            "pinned": self._pinned,
        }

    def close(self, timeout_s: float = 10.0) -> None:
        """Wait for the last snapshot to be committed (and a persist that was asked for to end), at most `timeout_s`; then let go."""
        if self._closed:
            return
        deadline_s = time.monotonic() + timeout_s
        if not self._copier.join(timeout_s):
            log.warning("rank %d: a copy has not ended within %.0f s", self.rank, timeout_s)
        if self._last is not None and self._link.connected and not self.inert:
            if not self.wait("committed", timeout_s=timeout_s):
                log.warning("rank %d: step %d was not committed within %.0f s", self.rank, self._last[1], timeout_s)
            elif self._persist_asked is not None:
                left_s = max(0.0, deadline_s - time.monotonic())
                if not self.wait("persisted", self._persist_asked, timeout_s=left_s):
                    log.warning("rank %d: step %d is still being persisted; the daemon goes on with it", self.rank, self._persist_asked)
        self._closed = True
        self._copier.close()
        for hook in self._hooks:
            hook.remove()
        self._link.close()
        self._let_go()

    def _abandon(self) -> None:
        """attach failed: leave nothing behind."""
        for hook in self._hooks:
            hook.remove()
        copier = getattr(self, "_copier", None)
        if copier is not None:
            copier.close()
        self._link.close()
        self._let_go()

    def _let_go(self) -> None:
        """Unmap the arena, if there is one."""
        if self._arena is not None:
            if self._pinned:
                unpin(self._arena.memory)
            self._binding.use(None)
            self._arena.close()
            self._arena = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _on_notice(self, message: Any) -> None:
        """Link's thread: a snapshot reached a state."""
        if isinstance(message, wire.Reached):
            with self._condition:
                key = message.attempt, message.step
                self._reached[message.state] = max(key, self._reached.get(message.state, key))
                self._condition.notify_all()
            if message.state.startswith("replicas differ"):
                self.counts["replicas differ"] += 1
                log.error("step %d: %s", message.step, message.state)
            if message.state.startswith("persist failed"):
                self.counts["persist failed"] += 1
                log.error("step %d: %s", message.step, message.state)


def _at_exit(session: weakref.ref[Session], pid: int) -> None:
    """The interpreter ends and nobody closed: end the copier (a thread that comes back from C++ into a dying interpreter aborts it)."""
    held = session()
    if held is not None and os.getpid() == pid:
        held.close(timeout_s=EXIT_S)


def _in_time(work: Callable[[], Any], timeout_s: float) -> Any:
    """Run `work` in a thread, and give up on it at the deadline: a hung mount cannot be interrupted, only left behind. Raises StoreFailed."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as e:  # noqa: BLE001  it is raised again where it is waited for
            future.set_exception(e)

    threading.Thread(target=run, name="ckptd-store", daemon=True).start()
    try:
        return future.result(timeout_s)
    except FutureTimeoutError as e:
        msg = f"the store did not answer within {timeout_s:.0f} s"
        raise StoreFailed(msg, remedy="is its mount hung?") from e


def attach(  # noqa: PLR0913  the face: every argument is a choice of the user's
    *,
    model: ModelArg,
    optimizer: OptimizerArg | None = None,
    extras: Mapping[str, Any] | None = None,
    job: str | None = None,
    store: str | os.PathLike[str] | None = None,
    persist_every: int | None = None,
    slots: int | None = None,
    parity: int | None = None,
    group_size: int | None = None,
    check_replicas_every: int | None = None,
    keep_newest: int = 2,
    keep_every: int = 0,
    local: Iterable[str] = (),
    paranoid: bool = False,
    directory: str | None = None,
    start_daemon: bool = True,
    required: bool = False,
    timeout_s: float = 60.0,
    group: Any = None,
    look: Look | None = None,
    kind: type[Session] = Session,
) -> Session:
    """Attach this rank's training state to its node's daemon. Collective over the ranks of the job.

    model: a module, several (pipeline stages: FQNs are global, so they must differ), or a dict of them. Wrappers (DDP, compile) are seen through.
    optimizer: one, several, or a dict; their state must be about parameters of the models.
    extras: name -> anything with state_dict/load_state_dict (schedulers, scaler, data loader), dicts and lists of plain values, random generators.
    job, store, persist_every, slots: default to $CKPTD_JOB (else torch elastic's run id, else the script's name), $CKPTD_STORE,
    $CKPTD_PERSIST_EVERY, $CKPTD_SLOTS, which `ckptd run` sets.
    parity, group_size: on several nodes, how many nodes of a group may be lost (default 1; 0: nodes do not protect each other), and how large groups
    are (default 8); $CKPTD_PARITY, $CKPTD_GROUP_SIZE.
    check_replicas_every: what several ranks hold identically (DDP, HSDP, norms under TP) is hashed and compared once within so many steps, a share in each, and
    a rank whose bytes differ from the others' is named as suspected silent corruption (default 50; 0: never; $CKPTD_CHECK_REPLICAS_EVERY).
    local: patterns of tensor names that every rank has for itself. paranoid: hash every source before and after its copy.
    look, kind: for adapters (`ckptd.integrations`): what finds this rank's state instead of `state.look`; the optimizers' steps are still the fence.

    Raises Unstorable (state that cannot be stored, by path), NotTiled (shards that do not tile), RanksMissing; and DaemonUnreachable or MemoryRefused
    only if `required`: otherwise training goes on without snapshots, which is said once and counted.
    """
    env = os.environ
    chosen = Settings(
        job=job or tapline.job_of_environment(),
        store=absolute(store if store is not None else env.get("CKPTD_STORE", "")),
        persist_every=persist_every if persist_every is not None else int(env.get("CKPTD_PERSIST_EVERY", "0")),
        slots=slots if slots is not None else int(env.get("CKPTD_SLOTS", "0")),
        parity=parity if parity is not None else int(env.get("CKPTD_PARITY", groups.PARITY_DEFAULT)),
        group_size=group_size if group_size is not None else int(env.get("CKPTD_GROUP_SIZE", groups.SIZE_DEFAULT)),
        check_replicas_every=check_replicas_every if check_replicas_every is not None else int(env.get("CKPTD_CHECK_REPLICAS_EVERY", replicas.EVERY)),
        keep_newest=keep_newest,
        keep_every=keep_every,
        local=tuple(local),
        paranoid=paranoid,
        directory=directory,
        start_daemon=start_daemon,
        kept=env.get("CKPTD_KEPT", "") == "1",
        required=required,
        timeout_s=timeout_s,
    )
    session = kind(chosen, _by_prefix(model, nn.Module), _by_prefix(optimizer, Optimizer), dict(extras or {}), meeting_of(group), look)
    try:
        session._attach()  # noqa: SLF001  the constructor only keeps; this is its other half
    except BaseException:
        session._abandon()  # noqa: SLF001
        raise
    return session


def _by_prefix(given: Any, kind: type) -> list[tuple[str, Any]]:
    """One, several or named -> (prefix, object). Names become "<name>."; several share one namespace, for their FQNs are global."""
    if given is None:
        return []
    if isinstance(given, kind):
        return [("", given)]
    found = [(f"{k}.", v) for k, v in given.items()] if isinstance(given, Mapping) else [("", v) for v in given]
    wrong = [v for _, v in found if not isinstance(v, kind)]
    if wrong:
        msg = f"expected {kind.__name__}, a sequence or a dict of them, not {type(wrong[0]).__name__}"
        raise BadArgument(msg)
    return found
