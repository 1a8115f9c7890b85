"""Protection at work: making this node's fragment of a snapshot, and decoding what a lost node held.

Both are the same walk: rows of blocks, each block read where it lies - here, or sent by a peer in the order of the rows - checked against its image's
checksums, and added to the place that its row's result has. A thread of its own receives a block, checks it and adds it while it is in a core's cache: a row's
first block straight into its place, the others one after the other into one buffer. That buffer is all that a walk holds, whatever it moves.

A fragment lies in an arena of its own, like an image: `u64 n | msgpack of Meta, padded to 4096 | parity blocks, row by row`, sealed with checksums. Its
Meta says whose parity it is and carries the members' checksums, so that whoever decodes an image can prove it; a successor adopts it from its arena alone.

Runs on the daemon's loop, but for that thread; other byte work goes to the pool that it is given.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import msgspec

from ckptd import arena
from ckptd.core import checksum, node, slots, wire
from ckptd.core.groups import Group, form
from ckptd.core.ladder import Fragment, Key, Remains
from ckptd.core.node import SlotRef
from ckptd.core.parity import Combine, Rows
from ckptd.core.stripes import Member, Part, Stripes, Task
from ckptd.errors import BadImage, CkptdError, MemoryRefused, NotFound, PeerFailed
from ckptd.held import Arenas, Guest, make_seal, put_seal
from ckptd.peers import AHEAD, Peers, ask, receive
from ckptd.peers import Held as Image
from ckptd.transport import Bulk, in_thread

log = logging.getLogger("ckptd.protect")

FRAGMENT_RANK = -1
"""Stands where ranks stand: in an arena's descriptor, and when a fragment is fetched."""
FRAGMENT_SLOTS = 2
"""The newest PROTECTED step's, and the one that is being made."""
GROWTH = 16
"""Slots have room for a sixteenth more, so that images may grow a little without new memory."""
META_BYTES_MAX = 1 << 30
META_BYTES_MIN, META_BYTES_PER_IMAGE = 4096, 64
"""Room in a header besides its checksums."""

DECODE_BLOCKS = 256
"""Decoded in one walk: then others may have the guest."""
ASIDE_BYTES = 2048 + 64
"""Results begin at multiples of 4 KiB, so the buffer does not: see `parity.Combine`."""
WALK_BYTES_MAX = ASIDE_BYTES + checksum.BLOCK_BYTES
"""What a walk holds besides the places of its results, however large the images are."""


class Meta(msgspec.Struct, frozen=True):
    """What a fragment says of itself. `digests`: by rank, of all members' images."""

    attempt: int
    step: int
    fragment: Fragment
    digests: dict[int, bytes]
    format: int = 1


def write_meta(meta: Meta) -> bytes:
    """A fragment's header."""
    body = msgspec.msgpack.encode(meta)
    room = slots.round_up(8 + len(body)) - 8
    return room.to_bytes(8, "little") + body.ljust(room, b"\0")


def read_meta(image: memoryview) -> tuple[Meta, int]:
    """A fragment's Meta, and where its parity begins. Raises BadImage."""
    n = int.from_bytes(image[:8], "little") if len(image) >= 8 else META_BYTES_MAX + 1
    if n > META_BYTES_MAX or 8 + n > len(image):
        msg = f"a fragment of {len(image)} bytes has no header of {n}"
        raise BadImage(msg)
    try:
        body = bytes(image[8 : 8 + n]).rstrip(b"\0")
        return msgspec.msgpack.decode(body, type=Meta), 8 + n
    except msgspec.MsgspecError as e:
        msg = f"a fragment's header: {e}"
        raise BadImage(msg) from e


class Source(msgspec.Struct, frozen=True):
    """Where a part lies: bytes [begin, end) of an image (or fragment) at a node (None: here), and how it is checked."""

    node: int | None
    rank: int
    begin: int
    end: int
    digests: bytes = b""
    """Of the image, where the part is one of its blocks; parity is proven by what it gives."""


class Host(Protocol):
    """What protection needs of the daemon. All are called on the loop."""

    peers: Peers
    arenas: Arenas

    def held(self, job: str, attempt: int, step: int, rank: int) -> Image:
        """An image in this node's memory, or (FRAGMENT_RANK) its fragment; raises NotFound."""

    def listing(self, job: str, attempt: int, step: int) -> list[tuple[int, int, bytes]]:
        """(rank, bytes, checksums) of this node's sealed images of a snapshot."""

    def snapshot(self, job: str, key: Key) -> node.Snapshot:
        """A snapshot that is known here; raises NotFound."""

    def number(self, job: str) -> int:
        """This node's number in the job's attempt."""

    def hold(self, made: arena.Arena) -> None:
        """A new arena: hold it."""

    async def in_pool(self, work: Callable[[], Any]) -> Any:
        """Byte work."""


class Place(msgspec.Struct, frozen=True):
    """This node's group in an attempt, and its position in it."""

    attempt: int
    group: Group
    position: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What a member computes, and where each result goes in its fragment."""

    stripes: Stripes
    member: int
    tasks: list[Task]
    places: list[tuple[int, int]]
    sends: frozenset[int] = frozenset()
    """Members whose blocks it takes."""

    @staticmethod
    def of(stripes: Stripes, member: int) -> Plan:
        """Pool: tens of microseconds per row; a node of 100 GB has 100,000."""
        tasks = [*stripes.encode(member)]
        places = stripes.places_of(member)
        return Plan(stripes, member, tasks, [places[t.row] for t in tasks], frozenset(p.member for t in tasks for p in t.parts))


class Protection:
    """The part of a daemon that makes fragments and decodes."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._places: dict[str, Place] = {}
        self._plans: dict[str, Plan] = {}
        """By job: the last one made. Images have the same sizes in every step."""

    def join(self, m: wire.Join) -> bool:
        """A rank joins an attempt: find this node's group. False where nothing is protected. Raises BadArgument."""
        if m.parity == 0 or len(m.peers) < 2:
            return False
        known = self._places.get(m.job)
        if known is not None and known.attempt == m.attempt:
            return True
        group = next(g for g in form(m.labels or [{}] * len(m.peers), size=m.group_size, parity=m.parity) if m.node in g.members)
        self._places[m.job] = Place(m.attempt, group, group.members.index(m.node))
        return True

    def leave(self, job: str) -> None:
        """The job is over."""
        self._places.pop(job, None)
        self._plans.pop(job, None)

    def status(self, job: str) -> dict[str, Any] | None:
        """This node's group, as plain values."""
        place = self._places.get(job)
        if place is None:
            return None
        held = sum(a.geometry.arena_bytes for a in self._host.arenas.of(job, FRAGMENT_RANK))
        return {"members": place.group.members, "parity": place.group.parity, "degraded": place.group.degraded, "fragment_bytes": held}

    async def make(self, job: str, key: Key) -> tuple[SlotRef, Fragment]:
        """This node's fragment of a step, sealed in a slot of its own. Raises CkptdError: what a peer, the memory or a checksum refused."""
        host, place, snapshot = self._host, self._places.get(job), self._host.snapshot(job, key)
        if place is None or place.attempt != key[0]:
            msg = f"attempt {key[0]} of job {job!r} has no groups here"
            raise NotFound(msg)
        images = await asyncio.gather(*(self._listing(n, job, key) for n in place.group.members))
        stripes = Stripes(place.group.parity, tuple(Member(tuple((rank, size) for rank, size, _ in held)) for held in images))
        plan = self._plans.get(job)
        if plan is None or (plan.stripes, plan.member) != (stripes, place.position):
            plan = self._plans[job] = await host.in_pool(partial(Plan.of, stripes, place.position))
        stripes, tasks, places = plan.stripes, plan.tasks, plan.places
        fragment = Fragment(snapshot.world_size, place.group.parity, place.position, stripes.members)
        digests = {rank: d for held in images for rank, _, d in held}
        header = write_meta(Meta(*key, fragment, digests))
        size = len(header) + stripes.fragment_bytes(place.position)
        held, slot = await self._room(job, key, size)
        seal, at = held.seal(slot), held.geometry.header_at(slot)
        gen = max(held.header(slot).gen, seal.gen, seal.released_gen) + 1
        words = slots.Header(
            slots.FILLING, gen, *key, size, 0, snapshot.world_size, snapshot.local_count, snapshot.node, snapshot.nodes
        )
        slots.begin(held.memory, at, words)
        try:
            image = held.image(slot, size)
            image[: len(header)] = header

            def locate(part: Part) -> Source:
                rank, begin, end = stripes.members[part.member].extent_of(part.block)
                return Source(place.group.members[part.member], rank, begin, end, digests[rank])

            nodes = {place.group.members[p] for p in plan.sends}
            await self._walk(job, key, nodes, {}, tasks, locate, lambda i: image[len(header) + places[i][0] : len(header) + places[i][1]])
            slots.flip(held.memory, at, slots.FILLED)
            put_seal(held, slot, gen, await host.in_pool(partial(make_seal, slot, gen, image, held.seal(slot))))
        except BaseException:
            with contextlib.suppress(ValueError):  # the job was forgotten, and its memory is gone
                slots.flip(held.memory, at, slots.VOID)
            raise
        return SlotRef(held.name, slot, gen), fragment

    async def _listing(self, member: int, job: str, key: Key) -> list[tuple[int, int, bytes]]:
        host = self._host
        here = member == host.number(job)
        images = host.listing(job, *key) if here else await host.peers.listing(host.peers.address_of(job, member), job, *key)
        wrong = [r for r, size, d in images if size <= 0 or r < 0 or len(d) != checksum.block_count(size) * checksum.DIGEST_BYTES]
        if wrong or not images:
            msg = f"node {member} describes image {wrong[0]} wrongly" if wrong else f"node {member} holds no sealed images of step {key[1]}"
            raise PeerFailed(msg)
        return sorted(images)

    async def _room(self, job: str, key: Key, size: int) -> tuple[arena.Arena, int]:
        """A free slot for a fragment; makes an arena, if there is none that is large enough. Raises MemoryRefused, NotFound (the job was forgotten)."""
        host = self._host
        fitting = [held for held in host.arenas.of(job, FRAGMENT_RANK) if held.geometry.slot_bytes >= size]
        for held in fitting:
            for slot in range(held.geometry.slots):
                if slots.is_free(held.header(slot), held.seal(slot).released_gen):
                    return held, slot
        if fitting:
            msg = f"all places for parity of job {job!r} are taken"
            raise MemoryRefused(msg)
        slot_bytes = size + size // GROWTH
        arena.admit(slot_bytes, FRAGMENT_SLOTS, 0)
        made = await host.in_pool(partial(arena.Arena.create, job=job, rank=FRAGMENT_RANK, slot_count=FRAGMENT_SLOTS, slot_bytes=slot_bytes))
        await host.in_pool(made.populate)
        try:
            host.snapshot(job, key)
        except NotFound:
            made.close()
            raise
        host.hold(made)
        return made, 0

    # --- what nobody holds any more -----------------------------------------------------------------------------------------

    async def open(self, image: tuple[str, int, int, int], remains: Remains) -> Guest:
        """An empty guest for an image that nobody holds; what it must be is written in each fragment of its group. Raises NotFound, PeerFailed."""
        job, attempt, step, rank = image
        here = self._host.number(job)
        sizes = dict(i for member in remains.members for i in member.images)
        blocks = sum(checksum.block_count(max(0, size)) for size in sizes.values())
        bytes_max = 2 * slots.round_up(META_BYTES_MIN + META_BYTES_PER_IMAGE * len(sizes) + checksum.DIGEST_BYTES * blocks)
        for owner in sorted(remains.fragments.values(), key=lambda n: n != here):
            try:
                if owner == here:
                    meta, _ = read_meta(self._host.held(job, attempt, step, FRAGMENT_RANK).image)
                else:
                    meta = await self._remote_meta(self._host.peers.address_of(job, owner), job, (attempt, step), bytes_max)
            except (CkptdError, OSError, TimeoutError) as e:
                log.warning("a fragment of step %d of job %s at node %d cannot be read: %s", step, job, owner, e)
                continue
            said = meta.fragment.members, meta.fragment.parity, meta.attempt, meta.step
            if said == (remains.members, remains.parity, attempt, step) and rank in sizes:
                guest = Guest.of(f"{job}/{step}/{rank}", owner, sizes[rank], meta.digests.get(rank, b""))
                guest.meta = meta
                return guest
        msg = f"no fragment of step {step} tells what the image of rank {rank} was"
        raise NotFound(msg)

    async def _remote_meta(self, address: str, job: str, key: Key, bytes_max: int) -> Meta:
        """The header of a fragment at a peer."""
        fetch = partial(self._host.peers.fetch, address, job, (*key, FRAGMENT_RANK))
        size = bytearray(8)
        await fetch([(0, 8)], memoryview(size))
        end = 8 + int.from_bytes(size, "little")
        if end > bytes_max:
            msg = f"the daemon at {address} says that its fragment has a header of {end} bytes"
            raise PeerFailed(msg)
        whole = memoryview(bytearray(end))
        whole[:8] = size
        await fetch([(8, end)], whole)
        return read_meta(whole)[0]

    async def decode(self, image: tuple[str, int, int, int], guest: Guest, remains: Remains, blocks: Sequence[int]) -> None:
        """Have blocks of a lost image in its guest, proven. Raises Lost (too many members), ChecksumMismatch, PeerFailed, NotFound."""
        job, attempt, step, rank = image
        host, meta, here = self._host, guest.meta, self._host.number(job)
        if not isinstance(meta, Meta):
            msg = f"image {image} was opened without its group"
            raise NotFound(msg)
        if (meta.fragment.parity, meta.fragment.members) != (remains.parity, remains.members):
            msg = f"image {image} was opened with another group"
            raise NotFound(msg)
        lost = {*remains.lost}
        plan, stripes = self._plans.get(job), Stripes(remains.parity, remains.members)
        member = next((p for p, m in enumerate(remains.members) if any(r == rank for r, _ in m.images)), -1)
        if member < 0 or not 0 < remains.parity < len(remains.members) or any(p not in range(stripes.n) for p in remains.fragments):
            msg = f"rank {rank} is not of this group, or this is no group"
            raise NotFound(msg)
        if plan is None or plan.stripes != stripes:
            plan = self._plans[job] = Plan(stripes, -1, [], [])
        stripes = plan.stripes
        await host.in_pool(lambda: [stripes.places_of(p) for p in remains.fragments])  # once; seconds, for a large node
        parity_begins = len(write_meta(meta))  # in every member's fragment: their headers differ in the position only

        def locate(part: Part) -> Source:
            if part.parity:
                begin, end = stripes.place_of(part.member, part.block)
                node, at, digests = remains.fragments[part.member], FRAGMENT_RANK, b""
                begin, end = parity_begins + begin, parity_begins + end
            else:
                at, begin, end = stripes.members[part.member].extent_of(part.block)
                node, digests = remains.images[at], meta.digests[at]
            return Source(None if node == here else node, at, begin, end, digests)

        def decoding(some: Sequence[int]) -> tuple[list[Task], set[int], set[int]]:
            tasks = [stripes.decode(member, stripes.members[member].block_of(rank, b), lost) for b in some]
            sources = [locate(p) for t in tasks for p in t.parts]
            return tasks, {s.node for s in sources if s.node is not None}, {s.rank for s in sources if s.node is None}

        async def have(some: Sequence[int]) -> None:
            tasks, nodes, ranks = await host.in_pool(partial(decoding, some))
            held = {r: host.held(job, attempt, step, r).image for r in ranks}
            extents, what = [checksum.extent_of(b, guest.image_bytes) for b in some], f"decoded image of rank {rank}"
            place, made = (lambda i: view[slice(*extents[i])]), (lambda i: guest.arrived(what, view, *extents[i]))
            await self._walk(job, (attempt, step), nodes, held, tasks, locate, place, made)

        with memoryview(guest.mapping) as view:
            for first in range(0, len(blocks), DECODE_BLOCKS):
                await have([b for b in blocks[first : first + DECODE_BLOCKS] if b not in guest.present])

    # --- the walk -----------------------------------------------------------------------------------------------------------

    async def _walk(
        self, job: str, key: Key, nodes: Collection[int], here: dict[int, memoryview], tasks: Sequence[Task], locate: Callable[[Part], Source],
        place: Callable[[int], memoryview], made: Callable[[int], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """Have the result of task number i in `place(i)`, then `made(i)`; parts come from where they lie: images `here` by rank, or one of `nodes`."""
        host = self._host
        async with contextlib.AsyncExitStack() as stack:

            async def dialled(node: int) -> tuple[int, Bulk]:
                return node, (await stack.enter_async_context(host.peers.dial(host.peers.address_of(job, node), job))).bulk()

            found = await asyncio.gather(*map(dialled, nodes), return_exceptions=True)  # all have ended, whichever failed
            for failed in found:
                if isinstance(failed, BaseException):
                    raise failed
            peers: dict[int, Bulk] = dict(found)  # type: ignore[arg-type]  # no exceptions are left in it
            walk = Walk(job, key, peers, here, tasks, locate, place, made)
            await in_thread(walk.run, walk.stop)


@dataclass(frozen=True, slots=True)
class Walk:
    """What the thread of a walk does."""

    job: str
    key: Key
    peers: dict[int, Bulk]
    here: dict[int, memoryview]
    tasks: Sequence[Task]
    locate: Callable[[Part], Source]
    place: Callable[[int], memoryview]
    made: Callable[[int], None]

    def run(self) -> None:
        """Thread. Asks for some rows ahead of the one that it computes."""
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        with mmap.mmap(-1, checksum.BLOCK_BYTES + ASIDE_BYTES, flags=private) as memory, memoryview(memory)[ASIDE_BYTES:] as buffer:
            ahead: deque[tuple[int, list[tuple[int, Source]]]] = deque()
            for number in range(len(self.tasks)):
                ahead.append((number, self._ask(number)))
                if len(ahead) > AHEAD:
                    self._row(*ahead.popleft(), buffer)
            while ahead:
                self._row(*ahead.popleft(), buffer)

    def stop(self) -> None:
        """Any thread: `run` fails at once."""
        for peer in self.peers.values():
            peer.hang_up()

    def _ask(self, number: int) -> list[tuple[int, Source]]:
        """Ask for the parts of a task; each with its coefficient, and first one that needs no computing."""
        task = self.tasks[number]
        parts = [*zip(task.coefficients[0], map(self.locate, task.parts), strict=True)]
        parts.sort(key=lambda p: p[0] != 1 or p[1].node is None or p[1].end - p[1].begin > task.bytes)
        for _, source in parts:
            if source.node is not None:
                ask(self.peers[source.node], self.job, (*self.key, source.rank), source.begin, source.end)
        return parts

    def _row(self, number: int, parts: list[tuple[int, Source]], buffer: memoryview) -> None:
        """A part may be longer than the block that is wanted: what it has beyond that is others'."""
        with self.place(number) as out:  # released at once, whoever keeps an exception: its memory may have to go
            if not parts:
                out[:] = bytes(len(out))
            for turn, (coefficient, source) in enumerate(parts):
                size = source.end - source.begin
                in_place = source.node is not None and turn == 0 and coefficient == 1 and size <= len(out)
                with self.here[source.rank][source.begin : source.end] if source.node is None else (out if in_place else buffer)[:size] as data:
                    if source.node is not None:
                        receive(self.peers[source.node], data)
                    if source.digests:
                        checksum.check_block(f"image of rank {source.rank}", source.begin // checksum.BLOCK_BYTES, data, source.digests)
                    if in_place:
                        out[size:] = bytes(len(out) - size)
                    else:
                        _combine_of((bytes((coefficient,)),))([data[: len(out)]], [out], accumulate=turn > 0)
        self.made(number)


@cache
def _combine_of(rows: Rows) -> Combine:
    """One per set of coefficients: there are few."""
    return Combine(rows)


def found(held: arena.Arena, ref: SlotRef, header: slots.Header) -> Fragment | None:
    """The fragment in a slot of an adopted arena, if it was sealed."""
    if held.seal(ref.slot).gen != ref.gen:
        return None
    try:
        meta, _ = read_meta(held.image(ref.slot, header.image_bytes))
    except BadImage:
        return None
    return meta.fragment if (meta.attempt, meta.step) == (header.attempt, header.step) else None
