"""What is known of a job's ranks and nodes just now: who they are, their last pulse, which reports were lost. Pure, constant memory.

Reports of a node carry a count: a gap in it is a lost report. A node that said nothing for a while is *silent*, and its ranks are *stale*: what their last
pulse said may no longer hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ckptd.monitor import record
from ckptd.monitor.hang import GONE, Standing
from ckptd.monitor.report import Health, OpenOp, Pulse, RankInfo, Report
from ckptd.monitor.settings import Settings

BUSY = 0.5
"""A rank that uses this part of a processor is at work."""


class Roll:
    """Ranks and nodes of one attempt."""

    def __init__(self, world_size: int, nodes: int, settings: Settings) -> None:
        self.world_size, self.settings = world_size, settings
        self.infos: dict[int, RankInfo] = {}
        self.members: dict[int, tuple[int, ...]] = {}
        self.pulses: dict[int, Pulse] = {}
        self.pulse_s: dict[int, float] = {}
        self.node_of = np.full(world_size, -1, np.int32)
        self.heard_s: dict[int, float] = {}
        self.sent: dict[int, int] = {}
        self.reports, self.reports_lost = 0, 0
        self.health: dict[int, Health] = {}
        self.nodes = nodes
        self._cpu: dict[int, tuple[float, int]] = {}
        self._busy: dict[int, float] = {}

    def hear(self, report: Report, now_s: float) -> None:
        """Take what a report says of nodes, ranks and pulses."""
        self.heard_s[report.node] = now_s
        last = self.sent.get(report.node)
        if report.sent:
            if last is not None and report.sent > last + 1:
                self.reports_lost += report.sent - last - 1
            self.sent[report.node] = report.sent
        self.reports += 1
        if report.health is not None:
            self.health[report.node] = report.health
        for info in report.ranks:
            if 0 <= info.rank < self.world_size:
                self.infos[info.rank] = info
                self.node_of[info.rank] = info.node
                for group in info.groups:
                    self.members[group.key] = tuple(group.members)
        for pulse in report.pulses:
            if 0 <= pulse.rank < self.world_size:
                self._pulse(pulse, now_s)

    def _pulse(self, pulse: Pulse, now_s: float) -> None:
        rank = pulse.rank
        before = self._cpu.get(rank)
        if before is not None and now_s > before[0] + 0.05:
            self._busy[rank] = (pulse.cpu_ms - before[1]) / 1e3 / (now_s - before[0])
        if before is None or now_s > before[0] + 0.2:
            self._cpu[rank] = (now_s, pulse.cpu_ms)
        self.pulses[rank] = pulse
        self.pulse_s[rank] = now_s

    def stale(self, now_s: float) -> frozenset[int]:
        """Ranks of silent nodes, and ranks that nobody ever told of, unless they are known to be gone."""
        silent = {n for n, at in self.heard_s.items() if now_s - at > self.settings.silent_s}
        unknown = self.world_size > len(self.infos)
        if not silent and not unknown:
            return frozenset()
        ranks = {r for r in self.infos if int(self.node_of[r]) in silent and not self.gone(r)}
        if unknown:
            ranks |= {r for r in range(self.world_size) if r not in self.infos and r not in self.pulses}
        return frozenset(ranks)

    def gone(self, rank: int) -> bool:
        """Dead, or ended in good order."""
        pulse = self.pulses.get(rank)
        return pulse is not None and (pulse.state in GONE or pulse.state == "closed")

    def standing(self, now_s: float, step: int) -> Standing:
        """For the hang detector."""
        stale = self.stale(now_s)
        pulses = {r: p for r, p in self.pulses.items() if r not in stale}
        busy = frozenset(r for r, part in self._busy.items() if part >= BUSY)
        return Standing(pulses, self.members, stale, step, busy)

    def place(self, rank: int) -> tuple[int, str]:
        """(node, words for people)."""
        info = self.infos.get(rank)
        if info is None:
            return -1, "unknown place"
        device = f", GPU {info.device}" if info.device >= 0 else ""
        return info.node, f"{info.host}, local rank {info.local_rank}{device}"

    def alarms(self, node: int) -> dict[str, str]:
        """What is wrong with a node, as it said last."""
        health = self.health.get(node)
        return dict(health.alarms) if health is not None else {}

    def ranks_of(self, node: int) -> list[int]:
        """All ranks of a node."""
        return [int(r) for r in np.flatnonzero(self.node_of == node)]

    def part_lost(self) -> float:
        """Of all reports."""
        return self.reports_lost / max(1, self.reports + self.reports_lost)

    def waits(self, places: Sequence[tuple[int, int, int]], limit: int = 256) -> list[dict[str, Any]]:
        """Who waits for whom, for people."""
        rows = {(r, row.key): row for r, p in self.pulses.items() for row in p.groups}
        found = []
        for rank, key, seq in places[:limit]:
            row: OpenOp | None = rows.get((rank, key))
            behind = [m for m in self.members.get(key, ()) if (other := rows.get((m, key))) is None or other.entered < seq]
            op = record.OPS[row.op] if row is not None and row.op < len(record.OPS) else "?"
            found.append({"rank": rank, "group": f"{key:x}", "op": op, "seq": seq, "for": behind[:16], "since_ms": row.since_ms if row else 0})
        return found
