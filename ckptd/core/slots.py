"""The bytes of an arena: a rank's shared memory, its slots, and the words by which trainer and daemon hand a slot over.

    page 0            descriptor, written by the daemon: who this memory belongs to (so that a successor can adopt it from the fd alone)
    slot 0, 1, ...    each: header page (trainer writes) | seal pages (daemon writes) | image area of `slot_bytes`

Two writers never share a word, so no lock is needed and a death at any instruction leaves a readable arena:

- the trainer takes a slot only if the daemon has released its last filling (`released_gen == gen`) or if it voided it itself;
- it sets state FILLING and a new `gen`, copies, and *last* flips state to FILLED. A torn slot is never FILLED;
- the daemon hashes a FILLED slot, writes the seal, and when nobody needs the image any more writes `released_gen = gen`.

Words are 8 bytes, aligned, little endian: single stores on every 64-bit machine. x86 keeps their order, and the state word is
followed by a message through a socket before anybody acts on it; a reader that finds FILLED without that message (adoption) comes
after the writer's death. Sources: SCR's and TigerBeetle's header-last rule; prometheus' mmap_dict on torn writes.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import xxhash

from ckptd.core import checksum
from ckptd.errors import BadImage

PAGE_BYTES = 4096
MAGIC = b"CKPTDAR1"
NAME_CHARS_MAX = 64
SLOTS_MIN = 2
SLOTS_MAX = 8

EMPTY, FILLING, FILLED, VOID = range(4)
"""States of a slot's header. VOID: the copy was torn (version guard) and the trainer may take the slot again."""

_WORDS = ("gen", "attempt", "step", "image_bytes", "rank", "world_size", "local_count", "node", "nodes")


class Descriptor(msgspec.Struct, frozen=True):
    """Whose memory an arena is, and its geometry."""

    arena: str
    job: str
    rank: int
    slots: int
    slot_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What the trainer says about a slot. `local_count`: ranks of this node; `node` of `nodes`: its place in the job."""

    state: int
    gen: int = 0
    attempt: int = 0
    step: int = 0
    image_bytes: int = 0
    rank: int = 0
    world_size: int = 0
    local_count: int = 0
    node: int = 0
    nodes: int = 0


@dataclass(frozen=True, slots=True)
class Seal:
    """What the daemon says about a slot: the last filling that it released, and the checksums of filling `gen`."""

    released_gen: int
    gen: int
    digests: bytes


@dataclass(frozen=True, slots=True)
class Geometry:
    """Byte offsets in an arena."""

    slots: int
    slot_bytes: int

    def __post_init__(self) -> None:
        if not SLOTS_MIN <= self.slots <= SLOTS_MAX or self.slot_bytes <= 0 or self.slot_bytes % PAGE_BYTES:
            msg = f"an arena has {SLOTS_MIN} to {SLOTS_MAX} slots of whole pages, not {self.slots} of {self.slot_bytes} bytes"
            raise ValueError(msg)

    @property
    def seal_bytes(self) -> int:
        """Room for the seal: five words and the checksums of a full slot."""
        return round_up(40 + checksum.block_count(self.slot_bytes) * checksum.DIGEST_BYTES)

    @property
    def stride(self) -> int:
        """From one slot to the next."""
        return PAGE_BYTES + self.seal_bytes + self.slot_bytes

    @property
    def arena_bytes(self) -> int:
        """The whole arena."""
        return PAGE_BYTES + self.slots * self.stride

    def header_at(self, slot: int) -> int:
        """Where a slot's header page begins."""
        return PAGE_BYTES + slot * self.stride

    def seal_at(self, slot: int) -> int:
        """Where a slot's seal begins."""
        return self.header_at(slot) + PAGE_BYTES

    def image_at(self, slot: int) -> int:
        """Where a slot's image begins."""
        return self.seal_at(slot) + self.seal_bytes


def round_up(n: int) -> int:
    """To whole pages."""
    return -(-n // PAGE_BYTES) * PAGE_BYTES


def _put(memory: memoryview, at: int, *words: int) -> None:
    for i, word in enumerate(words):
        memory[at + 8 * i : at + 8 * i + 8] = word.to_bytes(8, "little")


def _get(memory: memoryview, at: int) -> int:
    return int.from_bytes(memory[at : at + 8], "little")


def _check(*parts: bytes | memoryview) -> int:
    hasher = xxhash.xxh3_64()
    for part in parts:
        hasher.update(part)
    return hasher.intdigest()


def write_descriptor(memory: memoryview, descriptor: Descriptor) -> None:
    """Page 0 of a new arena."""
    body = msgspec.msgpack.encode(descriptor)
    if len(body) > PAGE_BYTES - 24:
        msg = f"descriptor of {len(body)} bytes does not fit a page"
        raise ValueError(msg)
    memory[24 : 24 + len(body)] = body
    _put(memory, 8, len(body), _check(body))
    memory[0:8] = MAGIC


def read_descriptor(memory: memoryview) -> Descriptor:
    """Page 0 of an adopted arena. Raises BadImage if this memory is no arena, or its size does not fit its geometry."""
    length = _get(memory, 8) if len(memory) >= PAGE_BYTES and memory[0:8] == MAGIC else PAGE_BYTES
    body = bytes(memory[24 : 24 + length]) if length <= PAGE_BYTES - 24 else b""
    if not body or _check(body) != _get(memory, 16):
        msg = "this memory is not an arena of ckptd"
        raise BadImage(msg)
    try:
        descriptor = msgspec.msgpack.decode(body, type=Descriptor)
        geometry = Geometry(descriptor.slots, descriptor.slot_bytes)
    except (msgspec.MsgspecError, ValueError) as e:
        msg = f"arena descriptor: {e}"
        raise BadImage(msg) from e
    if not (descriptor.arena.isascii() and descriptor.arena.isalnum() and len(descriptor.arena) <= NAME_CHARS_MAX):
        msg = f"{descriptor.arena[:NAME_CHARS_MAX]!r} is no name of an arena"  # it goes into messages to the service manager
        raise BadImage(msg)
    if geometry.arena_bytes != len(memory):
        msg = f"arena of {len(memory)} bytes, its descriptor says {geometry.arena_bytes}"
        raise BadImage(msg)
    return descriptor


def begin(memory: memoryview, at: int, header: Header) -> None:
    """Trainer: the slot is being filled. `at` is the header's offset."""
    _put(memory, at, FILLING)
    words = [getattr(header, w) for w in _WORDS]
    _put(memory, at + 8, *words)
    _put(memory, at + 8 + 8 * len(words), _check(memory[at + 8 : at + 8 + 8 * len(words)]))


def flip(memory: memoryview, at: int, state: int) -> None:
    """Trainer: the last store of a filling (FILLED), or its annulment (VOID)."""
    _put(memory, at, state)


def read_header(memory: memoryview, at: int) -> Header:
    """The header as it is; one whose words do not fit their check reads as FILLING: it is being written, or was torn.

    The state is read before and after the words: a FILLED that was followed by the words of the next filling is none.
    """
    state = _get(memory, at)
    if state not in {FILLING, FILLED, VOID}:
        return Header(EMPTY)
    raw = bytes(memory[at + 8 : at + 16 + 8 * len(_WORDS)])  # one copy: what is checked is what is returned
    if _check(raw[:-8]) != int.from_bytes(raw[-8:], "little") or _get(memory, at) != state:
        state = FILLING
    return Header(state, *(int.from_bytes(raw[8 * i : 8 * i + 8], "little") for i in range(len(_WORDS))))


def write_seal(memory: memoryview, at: int, gen: int, digests: bytes) -> None:
    """Daemon: the checksums of filling `gen`; its check is the last store."""
    _put(memory, at + 16, 0)
    memory[at + 40 : at + 40 + len(digests)] = digests
    _put(memory, at + 24, gen, len(digests))
    _put(memory, at + 16, _check(memory[at + 24 : at + 40], digests))


def read_seal(memory: memoryview, at: int, seal_bytes: int) -> Seal:
    """The seal; one whose check does not fit reads as no checksums (gen 0)."""
    gen, length = _get(memory, at + 24), _get(memory, at + 32)
    digests = bytes(memory[at + 40 : at + 40 + length]) if length <= seal_bytes - 40 else b""
    if not digests or _check(memory[at + 24 : at + 40], digests) != _get(memory, at + 16):
        gen, digests = 0, b""
    return Seal(_get(memory, at), gen, digests)


def release(memory: memoryview, at: int, gen: int) -> None:
    """Daemon: filling `gen` is needed no more. `at` is the seal's offset."""
    _put(memory, at, gen)


def is_free(header: Header, released_gen: int) -> bool:
    """Trainer: whether the slot may be filled."""
    return header.state in {EMPTY, VOID} or (header.state == FILLED and released_gen == header.gen)
