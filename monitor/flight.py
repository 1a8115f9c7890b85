"""Dumps of torch's Flight Recorder, one per rank, become the same verdicts that a live job gets. Files in, findings out; nothing of a file is executed.

    directory --> Dump per rank (pickle or JSON) --> levels: what was entered at which place of which group
                                                      |  first place where the operations differ -> ranks stand there: desync
                                                      `- else where each rank stands              -> hang.look: who is missing, who waits for whom

What dumps do not say, and what is done about it
- done or failed: an operation that timed out is "completed" for gloo. One that a member has not entered is not done, whatever the others' dumps say;
- a moment: dumps are written one after another. If ranks have completed several operations that another has not entered, the dumps are of different moments,
  and nothing is concluded from them;
- members: NCCL's `pg_config` lists them by group; gloo writes one entry under "" and overwrites it per group, so members are those that entered something,
  and of the default group all ranks. A rank without a dump is named as such where members are told;
- sends and receives: gloo records none.

Signatures: type, and where members may not differ, sizes, and dtype. Source of the fields: torch/csrc/distributed/c10d/FlightRecorderDetail.hpp of torch 2.13.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import xxhash
from msgspec import Meta

from ckptd.core import pickles
from ckptd.errors import BadForeign, NotFound
from ckptd.monitor import hang, record
from ckptd.monitor.report import Evidence, Finding, OpenOp, Pulse
from ckptd.monitor.ring import Group

FILE_BYTES_MAX = 256 << 20
ENTRIES_MAX = 1 << 20
RANKS_MAX = 1 << 16
TEXT_MAX = 1 << 20
FRAMES_SHOWN = 6
UNKNOWN_END_NS = 1000
OWN = "ckptd-tap"
"""A group of one in which ckptd's tap tries itself; all ranks' have this name."""
SKEW_MAX = 1
"""Operations that ranks may seem to have completed without another one: the one that failed."""

_BACKEND = re.compile(r"^[a-z_]+:")
_PEER = re.compile(r"(send|recv)\s+(\d{1,6})\s*(->|<-)\s*(\d{1,6})\b")
_RANK = re.compile(r"(?<!\d)(\d{1,6})$")
_OPS = {
    "allreduce": "all_reduce", "_all_gather_base": "all_gather", "allgather": "all_gather", "all_gather_into_tensor": "all_gather",
    "_allgather_base": "all_gather", "_reduce_scatter_base": "reduce_scatter", "_reduce_scatter_tensor_coalesced": "reduce_scatter_coalesced",
    "all_to_allv": "all_to_all", "alltoall": "all_to_all", "alltoall_base": "all_to_all", "all_reduce_barrier": "barrier", "recvanysource": "recv_any",
    "allreduce_coalesced": "all_reduce_coalesced", "allgather_into_tensor_coalesced": "all_gather_coalesced",
}  # fmt: skip
_DTYPES = {
    "Byte": ("u8", 1), "Char": ("i8", 1), "Short": ("i16", 2), "Int": ("i32", 4), "Long": ("i64", 8), "Half": ("f16", 2), "Float": ("f32", 4),
    "Double": ("f64", 8), "BFloat16": ("bf16", 2), "Bool": ("bool", 1), "ComplexFloat": ("c64", 8), "ComplexDouble": ("c128", 16),
    "Float8_e4m3fn": ("f8", 1), "Float8_e5m2": ("f8", 1),
}  # fmt: skip
UNEVEN = frozenset({"all_gather", "reduce_scatter", "all_to_all", "gather", "scatter", "all_gather_coalesced", "reduce_scatter_coalesced", "barrier"})
"""Members may bring different sizes, or the one that gives or takes brings more than the others."""


Number = Annotated[int, Meta(ge=-(1 << 31), le=1 << 62)]


class Entry(msgspec.Struct):
    """One operation, as far as it is used."""

    process_group: list[Any] = []
    pg_id: int = 0
    collective_seq_id: Number = 0
    p2p_seq_id: Number = 0
    profiling_name: str = ""
    input_sizes: list[Any] = []
    input_dtypes: list[Any] = []
    retired: bool = False
    state: str = ""
    is_p2p: bool = False
    frames: list[Any] = []
    time_created_ns: Number = 0
    time_discovered_completed_ns: Number | None = None

    @property
    def group(self) -> str:
        """The group's name: the same on all members, since all ranks make all groups."""
        return str(self.process_group[0]) if self.process_group else str(self.pg_id)

    @property
    def op(self) -> str:
        """The operation as `record.OPS` names it, or torch's own name."""
        name = _BACKEND.sub("", self.profiling_name).split(" ")[0]
        return _OPS.get(name.lower(), name.lower())

    @property
    def bytes(self) -> int:
        """Of all input tensors."""
        return sum(_numel(size) * _DTYPES.get(str(dtype), ("", 0))[1] for size, dtype in zip(self.input_sizes, self.input_dtypes, strict=False))

    @property
    def text(self) -> str:
        """For people."""
        sizes = ", ".join(f"{'x'.join(map(str, size)) or 'scalar'} {dtype}" for size, dtype in [*zip(self.input_sizes, self.input_dtypes, strict=False)][:4])
        return f"{self.op} of {sizes or 'nothing'}"[:200]


class Dump(msgspec.Struct):
    """One rank's file."""

    version: str = ""
    entries: list[Entry] = []
    pg_config: dict[str, dict[str, Any]] = {}
    pg_status: dict[str, dict[str, Number]] = {}


@dataclass
class Standing:
    """Where one rank stands in one group. `seqs`, `signatures`: of all operations in the dump, ascending."""

    seqs: np.ndarray[Any, np.dtype[np.int64]]
    signatures: np.ndarray[Any, np.dtype[np.uint64]]
    entered: int
    done: int
    newest: Entry | None = None
    p2p: Entry | None = None


@dataclass
class Job:
    """All dumps. `texts`: what a signature stands for."""

    standings: dict[str, dict[int, Standing]] = field(default_factory=dict)
    """group -> rank -> where it stands."""
    members: dict[str, list[int]] = field(default_factory=dict)
    ranks: list[int] = field(default_factory=list)
    absent: list[int] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    ops: dict[int, Entry] = field(default_factory=dict)
    frames: dict[int, str] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    """Groups whose members were told, not inferred."""
    notes: list[str] = field(default_factory=list)


# --- reading ----------------------------------------------------------------------------------------------------------------


def find(place: Path) -> dict[int, Path]:
    """rank -> its dump in a directory (or the one file), by the number that ends the file's name; of a rank's pickle and JSON the pickle, which has stacks."""
    found: dict[int, Path] = {}
    for path in [place] if place.is_file() else sorted(place.iterdir()):
        match = _RANK.search(path.name.removesuffix(".json").removesuffix(".pkl").removesuffix(".pickle"))
        if match is None or not path.is_file() or int(match[1]) >= RANKS_MAX:
            continue
        if int(match[1]) not in found or not path.name.endswith(".json"):
            found[int(match[1])] = path
    return found


def read(path: Path) -> Dump:
    """One dump. Raises BadForeign."""
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            msg = f"{path}: over {FILE_BYTES_MAX} bytes"
            raise BadForeign(msg)
        data = path.read_bytes()
        if data[:1] in {b"{", b" ", b"\n"}:
            return msgspec.json.decode(data, type=Dump, strict=False)
        value, _ = pickles.load(data)
        return msgspec.convert(value, Dump, strict=False)
    except (msgspec.MsgspecError, UnicodeDecodeError) as e:
        msg = f"{path}: not a Flight Recorder dump: {e}"
        raise BadForeign(msg, remedy="give a directory of dumps as torch writes them, one per rank, the rank at the end of each name") from e
    except BadForeign as e:
        msg = f"{path}: {e.message}"
        raise BadForeign(msg, remedy=e.remedy) from e
    except OSError as e:
        msg = f"{path}: {e.strerror}"
        raise NotFound(msg) from e


def gather(dumps: Iterable[tuple[int, Dump]]) -> Job:
    """All ranks' dumps as one job. A dump is let go of when it was looked at."""
    job = Job()
    configured: dict[str, set[int]] = {}
    for rank, dump in dumps:
        job.ranks.append(rank)
        _take(job, rank, dump)
        for key, config in dump.pg_config.items():
            members = [int(n) for n in re.findall(r"\b\d{1,6}\b", str(config.get("ranks", ""))[:TEXT_MAX])[:RANKS_MAX]]
            configured.setdefault(key, set()).update(m for m in members if m < RANKS_MAX)
    world = max([*job.ranks, *(m for members in configured.values() for m in members)], default=-1) + 1
    job.ranks.sort()
    job.absent = sorted(set(range(world)) - set(job.ranks))
    for name, by_rank in job.standings.items():
        everyone = range(world) if name in {"0", "default_pg"} else ()
        if configured.get(name):
            job.known.add(name)
        job.members[name] = sorted({*by_rank, *everyone, *(configured.get(name, ()) if name else ())})
    return job


def _take(job: Job, rank: int, dump: Dump) -> None:
    by_group: dict[str, list[Entry]] = {}
    for entry in dump.entries[-ENTRIES_MAX:]:
        if entry.group == OWN:
            continue
        by_group.setdefault(entry.group, []).append(entry)
    for name, entries in by_group.items():
        collectives = [e for e in entries if not e.is_p2p and e.collective_seq_id > 0]
        levels: dict[int, tuple[int, Entry]] = {}
        for e in collectives:
            before = levels[e.collective_seq_id][0] if e.collective_seq_id in levels else 0
            signature = _signature(e, before)
            job.texts.setdefault(signature, e.text)
            job.ops.setdefault(signature, e)
            levels[e.collective_seq_id] = (signature, e)
        seqs = np.array(sorted(levels), np.int64)
        status = dump.pg_status.get(str(entries[-1].pg_id), {})
        entered = max([status.get("last_enqueued_collective", 0), *levels], default=0)
        ended = max((s for s, (_, e) in levels.items() if e.retired or e.state == "completed"), default=0)
        done = max(status.get("last_completed_collective", ended), 0)
        pairs = [e for e in entries if e.is_p2p]
        newest = levels[int(seqs[-1])][1] if len(seqs) else None
        job.standings.setdefault(name, {})[rank] = Standing(
            seqs, np.array([levels[int(s)][0] for s in seqs], np.uint64), entered, done, newest, pairs[-1] if pairs else None
        )
    if dump.entries:
        job.frames[rank] = _frames(dump.entries[-1])


def _signature(entry: Entry, before: int) -> int:
    """Of an operation, after `before` of the same place (operations that were coalesced)."""
    op = entry.op
    sizes = [] if op in UNEVEN else [entry.bytes]
    dtypes = [] if op == "barrier" else [str(d) for d in entry.input_dtypes[:1]]
    return xxhash.xxh3_64_intdigest(msgspec.json.encode([before, op, sizes, dtypes]))


def _frames(entry: Entry) -> str:
    """The innermost frames outside torch of where an operation was called."""
    frames = [f for f in entry.frames if isinstance(f, dict)]
    ours = [f for f in frames if "/torch/" not in str(f.get("filename", ""))] or frames
    return "\n".join(f"{f.get('filename')}:{f.get('line')} in {f.get('name')}" for f in ours[:FRAMES_SHOWN])


def _numel(size: Any) -> int:
    return prod(int(n) for n in size) if isinstance(size, list | tuple) and all(isinstance(n, int) for n in size) else 0


# --- concluding -------------------------------------------------------------------------------------------------------------


def conclude(job: Job) -> tuple[list[Finding], list[dict[str, Any]]]:
    """What holds the job up, and who waits for whom (plain values)."""
    skew = _skew(job)
    if skew:
        return [skew], []
    differs = _first_differences(job)
    pulses = {r: Pulse(rank=r, idle_ms=0, step=0, records=0, state="", groups=_rows(job, r, differs)) for r in job.ranks}
    members = {_key(name): m for name, m in job.members.items()}
    findings, graph = hang.look(hang.Standing(pulses, members))
    pending = any(row.entered > row.done or row.p2p_open for p in pulses.values() for row in p.groups)
    if job.absent and pending and not any(f.kind == "desync" for f in findings):
        findings = [_without_dump(job), *(f for f in findings if f.kind != "comm-hang")]
    return [_told(job, f, differs) for f in findings], _waits(job, graph)


def _rows(job: Job, rank: int, differs: Mapping[str, int]) -> list[OpenOp]:
    rows = []
    for name, by_rank in job.standings.items():
        s = by_rank.get(rank)
        if s is None:
            if rank in job.members[name]:
                rows.append(OpenOp(key=_key(name), entered=0, done=0, op=0, dtype=0, bytes=0, signature=0, history=0, since_ms=0))
            continue
        entered, done = s.entered, s.done
        slowest = min((by_rank[m].entered if m in by_rank else 0 for m in job.members[name] if m in job.ranks), default=0)
        done = min(done, slowest, entered)
        at = differs.get(name, 0)
        if at and entered >= at:
            entered, done = at, at - 1
        place = int(np.searchsorted(s.seqs, entered))
        signature = int(s.signatures[place]) if place < len(s.seqs) and s.seqs[place] == entered else 0
        entry = job.ops.get(signature) if signature else s.newest
        p2p = s.p2p
        match = _PEER.search(p2p.profiling_name) if p2p else None
        rows.append(
            OpenOp(
                key=_key(name), entered=entered, done=done, op=_op_number(entry), dtype=_dtype_number(entry), bytes=entry.bytes if entry else 0,
                signature=signature, history=0, since_ms=0, p2p_op=record.OPS.index(match[1]) if match else 0,
                p2p_open=bool(match and p2p and not p2p.retired and p2p.state != "completed"),
                p2p_peer=_peer(job, name, rank, match), p2p_entered=p2p.p2p_seq_id if p2p else 0,
            )
        )  # fmt: skip
    return rows


def _peer(job: Job, name: str, rank: int, match: re.Match[str] | None) -> int:
    """The other end of a send ("0->1") or a receive ("0<-1"): places in the group, made global."""
    if match is None:
        return -1
    members, peer = job.members[name], int(match[4])
    mine = int(match[2])
    return members[peer] if max(peer, mine) < len(members) and members[mine] == rank else peer


def _first_differences(job: Job) -> dict[str, int]:
    """group -> the first place at which its members entered different operations."""
    found = {}
    for name, by_rank in job.standings.items():
        seqs = np.concatenate([s.seqs for s in by_rank.values()])
        if not len(seqs):
            continue
        signatures = np.concatenate([s.signatures for s in by_rank.values()])
        order = np.argsort(seqs, kind="stable")
        seqs, signatures = seqs[order], signatures[order]
        begins = np.flatnonzero(np.diff(seqs, prepend=seqs[0] - 1))
        differ = np.minimum.reduceat(signatures, begins) != np.maximum.reduceat(signatures, begins)
        if differ.any():
            found[name] = int(seqs[begins[np.argmax(differ)]])
    return found


def _skew(job: Job) -> Finding | None:
    """Whether the dumps are of different moments: somebody completed more than one operation that another has not entered."""
    for name, by_rank in job.standings.items():
        behind = min(by_rank, key=lambda r: by_rank[r].entered)
        ahead = max(by_rank, key=lambda r: by_rank[r].done)
        if by_rank[ahead].done > by_rank[behind].entered + SKEW_MAX:
            cause = f"the dumps are of different moments: rank {ahead} completed operation {by_rank[ahead].done} of group {name}, rank {behind} entered only {by_rank[behind].entered}"
            return Finding(kind="undecided", ranks=(), step=0, since_step=0, strength=0.2, cause=cause[:250], group=_key(name))
    return None


def _without_dump(job: Job) -> Finding:
    shown = " ".join(map(str, job.absent[:64]))
    evidence = (Evidence("ranks without a dump", shown),)
    return Finding(kind="undecided", ranks=(), step=0, since_step=0, strength=0.3, cause="others wait, and some ranks left no dump: they are gone, or could not write it", evidence=evidence)


def _told(job: Job, finding: Finding, differs: Mapping[str, int]) -> Finding:
    """With what dumps know besides: the group's name, shapes, and where the culprits (and one who waits) called it."""
    name = next((n for n in job.standings if _key(n) == finding.group), "")
    evidence = [e for e in finding.evidence if e.signal not in {"process state", "idle"} and not e.signal.endswith(" entered")]
    if name:
        evidence.append(Evidence("process group", f"{name}, ranks {' '.join(map(str, job.members[name][:64]))}"))
    shown = [*finding.ranks[:3], *finding.victims[:1]]
    for r in shown:
        s = job.standings.get(name, {}).get(r)
        if s is None:
            continue
        at = differs.get(name, 0) if finding.kind == "desync" else 0
        place = np.searchsorted(s.seqs, at) if at else len(s.seqs) - 1
        what = job.texts.get(int(s.signatures[place]), "") if 0 <= place < len(s.seqs) else ""
        evidence.append(Evidence(f"rank {r} entered", f"operation {at or s.entered}: {what}"))
    evidence += [Evidence(f"rank {r} called it in", job.frames[r]) for r in shown if job.frames.get(r)]
    cause = "all that left a dump entered it, and nobody has left it" if finding.kind == "comm-hang" and name not in job.known else finding.cause
    return msgspec.structs.replace(finding, evidence=tuple(evidence), cause=cause)


def _waits(job: Job, graph: hang.Graph) -> list[dict[str, Any]]:
    names = {_key(n): n for n in job.standings}
    rows = []
    for rank, key, seq in graph.waits()[:4096]:
        op = next((s.newest.op for s in [job.standings[names[key]].get(rank)] if s and s.newest), "")
        rows.append({"rank": rank, "group": names[key], "seq": seq, "op": op, "for": graph.missing[key, seq][:64]})
    return rows + [{"rank": r, "group": "", "seq": 0, "op": "send or receive", "for": peers[:64]} for r, peers in graph.peers.items()]


# --- a trace ----------------------------------------------------------------------------------------------------------------


def windows(dumps: Iterable[tuple[int, Dump]], job: Job) -> dict[str, Any]:
    """What `trace_export.render` takes. Times are the dumps' own, of each node's clock; where an end is not known, a slice is short."""
    ranks = []
    newest_ns = 0
    for rank, dump in dumps:
        names = [*dict.fromkeys(e.group for e in dump.entries)]
        records = np.zeros(len(dump.entries), record.RECORD)
        for i, e in enumerate(dump.entries):
            ended_ns = max(e.time_discovered_completed_ns or 0, e.time_created_ns + UNKNOWN_END_NS)
            records[i] = (
                i + 1, max(0, e.time_created_ns), ended_ns, ended_ns, min(max(e.bytes, 0), 1 << 62), (e.p2p_seq_id if e.is_p2p else e.collective_seq_id) & 0xFFFFFFFF, 0,
                min(names.index(e.group), record.NO_GROUP), _op_number(e), _dtype_number(e), record.P2P if e.is_p2p else 0, _written_peer(e), 0, 0,
            )  # fmt: skip
            newest_ns = max(newest_ns, ended_ns)
        ranks.append({"job": "dump", "rank": rank, "pid": 0, "records": records, "groups": [_ring_group(job, name, rank) for name in names[: record.NO_GROUP]]})
    return {"ranks": ranks, "verdicts": [], "now_ns": newest_ns, "now_s": 0.0}


def _written_peer(entry: Entry) -> int:
    match = _PEER.search(entry.profiling_name)
    return int(match[4]) & 0x7FFFFFFF if match else -1


def _ring_group(job: Job, name: str, rank: int) -> Group:
    members = job.members.get(name, [rank])
    mine = members.index(rank) if rank in members else 0
    return Group(_key(name), len(members), mine, tuple(members), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, False, -1, 0, 0, 0)  # noqa: FBT003  a row that says nothing of now


def _key(name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode())


def _op_number(entry: Entry | None) -> int:
    return record.OPS.index(entry.op) if entry and entry.op in record.OPS else 0


def _dtype_number(entry: Entry | None) -> int:
    name = _DTYPES.get(str(entry.input_dtypes[0]), ("other", 0))[0] if entry and entry.input_dtypes else "?"
    return record.DTYPES.index(name)
