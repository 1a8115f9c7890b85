"""What ranks bring to the meetings of a session, and what rank 0 makes of it: pure.

attach    Arrival -> gather -> Place           which daemons, which attempt, what there is to restore
plan      Told -> plan_for_all -> pieces       who stores what
restore   Staging -> all_staged -> go on or next rung
"""

from __future__ import annotations

import secrets

import msgspec

from ckptd.core import proof, replicas
from ckptd.core.ladder import Durable, Holding, Key, Rung, guarded, lost, rungs
from ckptd.core.plan import LeafDecl, mesh_digest, plan_capture
from ckptd.errors import CkptdError, Lost, UserError


class Arrival(msgspec.Struct, array_like=True):
    """What a rank brings to the first meeting."""

    error: str = ""
    message: str = ""
    remedy: str = ""
    no_daemon: str = ""
    daemon: str = ""
    address: str = ""
    attempt_max: int = 0
    holdings: list[Holding] = []
    failed: list[tuple[int, int, str]] = []
    durable: list[Durable] = []
    broken: list[str] = []
    """Checkpoints that cannot be read, or why the durable tier cannot."""
    labels: dict[str, str] = {}


class Place(msgspec.Struct, array_like=True):
    """What it takes home: the attempt, its node among the daemons, and the ladder."""

    attempt: int
    no_daemon: str
    node: int
    local_count: int
    peers: list[str]
    rungs: list[Rung]
    broken: list[str] = []
    labels: list[dict[str, str]] = []
    guarded: Key | None = None
    """The newest snapshot that is under parity."""
    secret: bytes = b""
    """What this attempt's daemons know each other by."""


class PieceMessage(msgspec.Struct, array_like=True):
    """A core.image.Piece."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    box: tuple[tuple[int, ...], tuple[int, ...]]
    view: str


class Told(msgspec.Struct):
    """What a rank brings to the planning: its leaves, or why it has none."""

    error: str
    message: str
    remedy: str
    leaves: list[LeafDecl]
    coords: dict[str, int]
    objects: list[str]
    complete: bool


class Staging(msgspec.Struct):
    """What a rank brings to the meeting between staging and applying."""

    error: str = ""
    message: str = ""
    remedy: str = ""
    unexpected: list[str] = []


def gather(brought: list[bytes]) -> list[bytes]:
    """Rank 0, at attach: group the ranks by daemon, number the attempt, order the ladder."""
    arrivals = [msgspec.msgpack.decode(b, type=Arrival) for b in brought]
    for a in arrivals:
        if a.error:
            raise error_of(a.error, a.message, a.remedy)
    no_daemon = next((a.no_daemon for a in arrivals if a.no_daemon), "")
    daemons = [*dict.fromkeys(a.daemon for a in arrivals)]
    durable = arrivals[0].durable
    known = [a.attempt_max for a in arrivals] + [d.attempt for d in durable]
    failed = {(f[0], f[1], f[2]) for a in arrivals for f in a.failed}
    first = {d: next(a for a in arrivals if a.daemon == d) for d in daemons}
    held = {} if no_daemon else {i: first[d].holdings for i, d in enumerate(daemons)}
    ladder = rungs(held, durable, failed)
    broken = arrivals[0].broken + [
        f"step {step} was committed (attempt {attempt}), and more nodes were lost since than parity makes up for: images of ranks {ranks} are gone"
        for (attempt, step), ranks in lost(held)
    ]
    secret = secrets.token_bytes(proof.SECRET_BYTES)
    return [
        msgspec.msgpack.encode(
            Place(
                max(known) + 1, no_daemon, daemons.index(a.daemon), sum(b.daemon == a.daemon for b in arrivals),
                [first[d].address for d in daemons], ladder, broken, [first[d].labels for d in daemons], guarded(held), secret,
            )
        )
        for a in arrivals
    ]  # fmt: skip


def plan_for_all(brought: list[bytes]) -> list[bytes]:
    """Rank 0: who stores what, the names that any rank has, one word for the mesh, whether all leaves are known, and what others hold too."""
    told = [msgspec.msgpack.decode(b, type=Told) for b in brought]
    for t in told:
        if t.error:
            raise error_of(t.error, t.message, t.remedy)
    plan = plan_capture({r: t.leaves for r, t in enumerate(told)})
    names = sorted({leaf.name for t in told for leaf in t.leaves} | {name for t in told for name in t.objects})
    shared = replicas.shared({r: t.leaves for r, t in enumerate(told)})
    mesh, complete = mesh_digest([t.coords for t in told]), all(t.complete for t in told)
    return [
        msgspec.msgpack.encode(
            ([PieceMessage(p.name, p.dtype, p.shape, (p.box.start, p.box.extent), p.view) for p in plan[r]], names, mesh, complete, shared[r])
        )
        for r in range(len(brought))
    ]


def all_staged(brought: list[bytes]) -> list[bytes]:
    """Rank 0: go on (b"") if every rank has staged; the caller's mistakes are raised, everything else sends all ranks down the ladder."""
    outcomes = [msgspec.msgpack.decode(b, type=Staging) for b in brought]
    for o in outcomes:
        if o.error and isinstance(error_of(o.error, "", ""), UserError) and o.error != "NotFound":
            raise error_of(o.error, o.message, o.remedy)
    failed = [o.message for o in outcomes if o.error]
    why = "; ".join(failed[:3]) + (f"; and {len(failed) - 3} more ranks" if len(failed) > 3 else "")
    return [why.encode()] * len(brought)


def first_trouble(brought: list[bytes]) -> list[bytes]:
    """Rank 0: what is wrong with any of them is wrong with all."""
    return [next((b for b in brought if b), b"")] * len(brought)


def error_of(name: str, message: str, remedy: str) -> CkptdError:
    """The error that a rank, a daemon or rank 0 named."""
    from ckptd import errors

    kind: type[CkptdError] = getattr(errors, name, Lost)
    return kind(message, remedy=remedy)
