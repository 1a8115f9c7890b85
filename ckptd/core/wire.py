"""Messages, and how they are framed: u32 length (little endian), then msgpack of one tagged struct.

One declaration is schema, validator and codec. `decode` raises PeerFailed for anything that is not one of these messages; the length is
checked before memory is allocated. Requests carry an `id` that their reply repeats. No pickle on any wire.

Local (Unix socket): trainers, launchers and the command line talk to their node's daemon. A message that brings a file descriptor says so
in its docstring; descriptors travel by SCM_RIGHTS with the frame's first byte.
Remote (TCP): daemons talk to daemons. `Blocks` is followed by `bytes` raw bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from ckptd.core.ladder import Holding, Key, Remains
from ckptd.core.rendezvous import NODES_MAX, Beat, Roster, Text, Wish
from ckptd.errors import NotFound, PeerFailed

PROTOCOL = 4
MESSAGE_BYTES_MAX = 16 << 20
"""The longest message holds the checksums of an image: 16 MiB are those of one TiB."""


REQUEST_BYTES_MAX = 2 << 20
"""Of what a daemon is sent by clients."""
RANGES_MAX = 1 << 17
"""Of blocks in one Ensure: as many as in 256 GiB, none beside another."""
LABELS_MAX, REPLICAS_MAX = 16, 1 << 14
STACK_CHARS_MAX = 64 << 10
WATCH_BYTES_MAX = 8 << 20
"""Of a node's summaries in one message."""


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages."""


class Request(Message, frozen=True, kw_only=True):
    """A message that wants an answer with the same id."""

    id: int


# --- local: requests --------------------------------------------------------------------------------------------------------


class Hello(Request, frozen=True, kw_only=True):
    """First word of a client. Answer: Welcome."""

    job: str = ""
    role: str = "rank"
    """"rank", "tap" (a trainer's collectives), "keeper" (launcher: is given every arena of the job), "agent" (launcher: takes part in the rendezvous) or "cli"."""
    rank: int = -1
    protocol: int = PROTOCOL


class Welcome(Message, frozen=True, kw_only=True):
    """What the daemon is, and what it holds of the job; in-flight snapshots of dead ranks are settled first."""

    id: int
    daemon: str
    peer_address: str
    attempt_max: int
    holdings: list[Holding]
    failed: list[tuple[int, int, str]]
    labels: dict[str, str] = {}
    """The node's failure domains."""


class Join(Request, frozen=True, kw_only=True):
    """A rank joins an attempt and asks for memory; with its arena's descriptor if it rejoins a new daemon. Answer: Granted (+ arena fd)."""

    job: str
    attempt: int
    rank: int
    world_size: int
    local_count: int
    node: int
    peers: Annotated[list[Text], Meta(max_length=NODES_MAX)]
    """Peer addresses of the job's daemons, by node."""
    image_bytes: int
    """Bytes a slot must hold; 0 when rejoining."""
    slots: int
    store: str = ""
    keep_newest: int = 2
    keep_every: int = 0
    parity: int = 0
    """How many nodes of a group may be lost; 0: nothing is protected."""
    group_size: int = 8
    labels: Annotated[list[Annotated[dict[Text, Text], Meta(max_length=LABELS_MAX)]], Meta(max_length=NODES_MAX)] = []
    """Failure domains, by node."""
    protected: Key | None = None
    """When rejoining: the newest PROTECTED step that this rank heard of."""
    secret: bytes = b""
    """What daemons of this attempt know each other by."""


class Granted(Message, frozen=True, kw_only=True):
    """+ arena fd if `brings`: not where it was handed back with Join."""

    id: int
    arena: str
    slots: int
    slot_bytes: int
    brings: bool = True
    note: str = ""


class Open(Request, frozen=True, kw_only=True):
    """Give access to an image that some daemon of the job holds, or that can be decoded from what `remains`. Answer: Opened (+ fd to map read-only)."""

    job: str
    attempt: int
    step: int
    rank: int
    node: int
    remains: Remains | None = None


class Opened(Message, frozen=True, kw_only=True):
    """+ fd. The image lies at `offset`; only blocks that were ensured are valid."""

    id: int
    image: str
    offset: int
    image_bytes: int
    digests: bytes


class Ensure(Request, frozen=True, kw_only=True):
    """Have these blocks present and verified in the opened image. Answer: Done."""

    image: str
    blocks: Annotated[list[tuple[int, int]], Meta(max_length=RANGES_MAX)]
    """[first, last) block numbers."""


class Enter(Request, frozen=True, kw_only=True):
    """A launcher (role "agent") wants its node to be of the job's next roster; or says that it runs in one. Answer: Entered, later Gathered."""

    job: str
    wish: Wish
    secret: bytes
    """What daemons of the job know each other by, before there is an attempt."""
    running: int = 0
    """The epoch that it runs in: said to a daemon that came back."""


class Entered(Message, frozen=True, kw_only=True):
    """Heard."""

    id: int
    address: str
    """Where other nodes reach this one's daemon."""


def image_id(m: Open) -> str:
    """What Opened and Ensure call the image that was asked for."""
    return f"{m.attempt}/{m.step}/{m.rank}/{m.job}"


def parse_image_id(image: str) -> tuple[str, int, int, int]:
    """(job, attempt, step, rank). Raises NotFound."""
    try:
        attempt, step, rank, job = image.split("/", 3)
        return job, int(attempt), int(step), int(rank)
    except ValueError as e:
        msg = f"{image!r} names no image"
        raise NotFound(msg) from e


class Watch(Request, frozen=True, kw_only=True):
    """+ ring fd: a tap has its rank watched, whose header says the rest (monitor/record.py). Again when job or attempt became known. Answer: Watched."""

    job: str
    rank: int
    attempt: int = 0
    policy: Text = ""
    """What may follow from a verdict: "report", "snapshot", "restart" or "evict"; "": as the launcher or the daemon was told."""


class Watched(Message, frozen=True, kw_only=True):
    """Heard. `watching`: false where the daemon was told not to watch; the tap may then stop writing."""

    id: int
    watching: bool = True


class Forget(Request, frozen=True, kw_only=True):
    """The job is over: free its memory. Answer: Done."""

    job: str


class Status(Request, frozen=True, kw_only=True):
    """Answer: Report."""


class Report(Message, frozen=True, kw_only=True):
    """The daemon's state as plain values."""

    id: int
    status: dict[str, Any]


class Shutdown(Request, frozen=True, kw_only=True):
    """Leave. Answer: Done, then the daemon goes."""


class Done(Message, frozen=True, kw_only=True):
    """Yes."""

    id: int


class Refused(Message, frozen=True, kw_only=True):
    """No: the name of a class of `ckptd.errors`, its message and its remedy."""

    id: int
    error: str
    message: str
    remedy: str = ""


# --- local: notices ---------------------------------------------------------------------------------------------------------


class Filled(Message, frozen=True, kw_only=True):
    """A slot's header says FILLED. `replicas`: hashes of some of what other ranks hold too (core/replicas.py)."""

    step: int
    slot: int
    gen: int
    replicas: Annotated[dict[Text, int], Meta(max_length=REPLICAS_MAX)] = {}


class Skipped(Message, frozen=True, kw_only=True):
    """This rank will not have this step."""

    step: int
    reason: str


class Persist(Message, frozen=True, kw_only=True):
    """Persist the newest committed snapshot at or after `step`."""

    step: int


class Chose(Message, frozen=True, kw_only=True):
    """The job's restore chose (attempt, step) in memory; -1, -1: the durable tier or a fresh start. `protected`: as in core.node.Chosen."""

    attempt: int
    step: int
    protected: Key | None = None


class RestoreFailed(Message, frozen=True, kw_only=True):
    """(attempt, step) from `source` could not be restored."""

    attempt: int
    step: int
    source: str
    why: str


class HandBack(Message, frozen=True, kw_only=True):
    """+ arena fd: a keeper or a trainer gives an arena to a new daemon."""


class Kept(Message, frozen=True, kw_only=True):
    """+ arena fd: the daemon gives a keeper an arena to hold."""

    arena: str


class Dropped(Message, frozen=True, kw_only=True):
    """A keeper may let go of an arena."""

    arena: str


class Gathered(Message, frozen=True, kw_only=True):
    """To an agent: the roster that it waited for, and its place in it."""

    roster: Roster
    position: int


class Regroup(Message, frozen=True, kw_only=True):
    """To an agent that runs: why it should stop its workers and enter; "" takes that back."""

    why: str


class Closed(Message, frozen=True, kw_only=True):
    """To an agent: the job is over. From one: so it is, for all nodes."""


class ProbeAsked(Message, frozen=True, kw_only=True):
    """To a tap: at the end of the step that is under way, measure "compute" or "memory" for about `seconds`, and say Probed."""

    probe: int
    kind: Text
    seconds: float


class ProbeDone(Message, frozen=True, kw_only=True):
    """From a tap: what it measured, per second (FLOP or bytes); 0: it could not."""

    probe: int
    kind: Text
    rate: float
    best: float = 0.0
    """Of the best repeat alone; `rate` is all work over all time."""
    device: Text = "cpu"


class StacksAsked(Message, frozen=True, kw_only=True):
    """To a tap: say where all threads stand (by faulthandler's C code, which needs no GIL). Answer: Stacks, as far as the process can."""

    ask: int


class StacksDone(Message, frozen=True, kw_only=True):
    """From a tap."""

    ask: int
    text: Annotated[str, Meta(max_length=STACK_CHARS_MAX)]


class Act(Message, frozen=True, kw_only=True):
    """To a keeper (launcher): do what policy says of a verdict: "restart" the job's workers, or "evict" `ranks` (of this attempt) and go on without them."""

    verdict: int
    attempt: int
    action: Text
    ranks: list[int]
    why: Annotated[str, Meta(max_length=1024)]


class Ending(Message, frozen=True, kw_only=True):
    """From a keeper: the job's workers of this node are ended on purpose (a restart, nodes that come or go): their deaths are no faults."""


class Acted(Message, frozen=True, kw_only=True):
    """From a keeper: what it did, or why not (`done` false)."""

    verdict: int
    done: bool
    what: Text


class Reached(Message, frozen=True, kw_only=True):
    """A snapshot reached a state: "committed", "protected", "persisted", "skipped", "persist failed: ..."."""

    attempt: int
    step: int
    state: str


# --- remote -----------------------------------------------------------------------------------------------------------------


class Knock(Message, frozen=True, kw_only=True):
    """First word of a daemon to a daemon: for which attempt of which job it comes. Answer: Prove. See core/proof.py."""

    job: str
    attempt: int
    nonce: bytes


class Prove(Message, frozen=True, kw_only=True):
    """Who sends this knows the secret of the job's attempt. `nonce`: of the end that listens."""

    nonce: bytes
    proof: bytes


class PeerHello(Message, frozen=True, kw_only=True):
    """First word of a daemon that will tell news. `node` now listens at `address`."""

    job: str
    attempt: int
    node: int
    address: str
    protocol: int = PROTOCOL


class PeerNews(Message, frozen=True, kw_only=True):
    """Something of the life of a snapshot, as in core.node.TellPeers, or "replicas"; `digests` by rank with a part of PERSIST."""

    job: str
    attempt: int
    step: int
    node: int
    what: str
    errand: str = ""
    after: Key | None = None
    digests: dict[int, bytes] = {}
    replicas: dict[int, dict[str, int]] = {}
    """With "replicas", to node 0 before "sealed": rank -> what it said."""


class PeerBeat(Message, frozen=True, kw_only=True):
    """What a node has to say about who runs the job: core/rendezvous.py. Travels in connections of attempt 0."""

    job: str
    beat: Beat


class PeerWatch(Message, frozen=True, kw_only=True):
    """To the job's coordinator (node 0): a monitor.report.Report, encoded. To all: a death ("crash"), at once."""

    job: str
    attempt: int
    node: int
    report: Annotated[bytes, Meta(max_length=WATCH_BYTES_MAX)]


class PeerAsk(Message, frozen=True, kw_only=True):
    """From the coordinator: "compute" or "memory" (have `ranks` probed), "transfer" (measure to node `other`), "stacks" or "pulses" of `ranks`."""

    job: str
    attempt: int
    ask: int
    what: Text
    ranks: Annotated[list[int], Meta(max_length=NODES_MAX)] = []
    other: int = -1
    seconds: float = 0.2


class PeerVerdict(Message, frozen=True, kw_only=True):
    """From the coordinator to all: a monitor.report.Verdict, encoded; `action` is what each node's launcher is told."""

    job: str
    attempt: int
    verdict: Annotated[bytes, Meta(max_length=WATCH_BYTES_MAX)]


class Describe(Message, frozen=True, kw_only=True):
    """What is image `rank` of this snapshot? Answer: Described or Refused (id 0)."""

    job: str
    attempt: int
    step: int
    rank: int


class Described(Message, frozen=True, kw_only=True):
    """Size and checksums of an image."""

    image_bytes: int
    digests: bytes


class List(Message, frozen=True, kw_only=True):
    """Which images of this snapshot do you hold? Answer: Listed."""

    job: str
    attempt: int
    step: int


class Listed(Message, frozen=True, kw_only=True):
    """(rank, bytes, checksums), by rank; none if it is not sealed here."""

    images: list[tuple[int, int, bytes]]


class Fetch(Message, frozen=True, kw_only=True):
    """Send bytes [begin, end) of an image; rank -1: of the node's fragment. Answer: Blocks and the bytes, or Refused (id 0)."""

    job: str
    attempt: int
    step: int
    rank: int
    begin: int
    end: int


class Blocks(Message, frozen=True, kw_only=True):
    """`bytes` raw bytes follow."""

    bytes: int


class Transfer(Message, frozen=True, kw_only=True):
    """`bytes` raw bytes follow, which mean nothing: how fast they come is measured (ckptd/probing.py). The `last` is answered by Transferred."""

    job: str
    attempt: int
    bytes: int
    last: bool = False


class Transferred(Message, frozen=True, kw_only=True):
    """So many bytes came in so much time, after the first of them."""

    bytes: int
    seconds: float


LOCAL = (
    Hello | Welcome | Join | Granted | Open | Opened | Ensure | Enter | Entered | Gathered | Regroup | Closed | Forget | Status | Report | Shutdown | Done | Refused
    | Filled | Skipped | Persist | Chose | RestoreFailed | HandBack | Kept | Dropped | Reached
    | Watch | Watched | ProbeAsked | ProbeDone | StacksAsked | StacksDone | Act | Acted | Ending
)  # fmt: skip
TO_DAEMON = (
    Hello | Join | Open | Ensure | Enter | Forget | Status | Shutdown | Filled | Skipped | Persist | Chose | RestoreFailed | HandBack | Closed
    | Watch | ProbeDone | StacksDone | Acted | Ending
)
"""What a daemon takes from a client: none of it is long, and what it says itself is not decoded again."""
REMOTE = Knock | Prove | PeerHello | PeerNews | PeerBeat | PeerWatch | PeerAsk | PeerVerdict | Describe | Described | List | Listed | Fetch | Blocks | Transfer | Transferred | Refused

_ENCODER = msgspec.msgpack.Encoder()
_DECODERS = {"local": msgspec.msgpack.Decoder(LOCAL), "daemon": msgspec.msgpack.Decoder(TO_DAEMON), "remote": msgspec.msgpack.Decoder(REMOTE)}
_BYTES_MAX = {"daemon": REQUEST_BYTES_MAX}


def encode(message: Message) -> bytes:
    """A frame."""
    body = _ENCODER.encode(message)
    if len(body) > MESSAGE_BYTES_MAX:
        msg = f"a {type(message).__name__} of {len(body)} bytes is over the limit of {MESSAGE_BYTES_MAX}"
        raise PeerFailed(msg)
    return len(body).to_bytes(4, "little") + body


def decode(body: bytes | bytearray | memoryview, kind: str) -> Any:
    """The message in a frame's body; `kind` is "local", "daemon" (local, for a daemon's ears) or "remote". Raises PeerFailed."""
    try:
        return _DECODERS[kind].decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        msg = f"not a message of protocol {PROTOCOL}: {e}"
        raise PeerFailed(msg) from e


def frame_length(head: bytes | bytearray | memoryview, bytes_max: int = MESSAGE_BYTES_MAX) -> int:
    """The length in a frame's first four bytes. Raises PeerFailed if it is out of bounds."""
    length = int.from_bytes(head[:4], "little")
    if not 0 < length <= bytes_max:
        msg = f"a frame of {length} bytes is out of bounds (1 to {bytes_max})"
        raise PeerFailed(msg)
    return length


class Framer:
    """Bytes in, messages out. Holds at most one unfinished frame."""

    def __init__(self, kind: str) -> None:
        self._kind, self._bytes_max = kind, _BYTES_MAX.get(kind, MESSAGE_BYTES_MAX)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """Messages that `data` completes. Raises PeerFailed; the connection is then of no more use."""
        self._buffer += data
        while len(self._buffer) >= 4:
            end = 4 + frame_length(self._buffer, self._bytes_max)
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[4:end])
            del self._buffer[:end]
            yield decode(body, self._kind)
