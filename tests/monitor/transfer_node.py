"""A daemon's peers without the daemon: `transfer_node.py NUMBER RATE ADDRESS ...`, addresses by node. Says "ready", then answers each number on stdin with the rate to that node."""

from __future__ import annotations

import asyncio
import json
import sys

from ckptd import probing
from ckptd.peers import Peers

JOB, SECRET = "transfers", bytes(range(32))


class Nobody:
    """Who has nothing to tell."""

    def greeting(self, job: str) -> list:
        return []

    def heard(self, news: object) -> None: ...

    def watched(self, message: object) -> None: ...

    def gathering(self, job: str) -> None: ...


async def main(number: int, rate: float, addresses: list[str]) -> None:
    peers = Peers(Nobody(), rate)
    host, _, port = addresses[number].rpartition(":")
    await peers.start(host, int(port), must=True)
    peers.join(JOB, 1, number, addresses, SECRET)
    print("ready", flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        order = json.loads(line)
        began = loop.time()
        found = await probing.transfer(peers, JOB, order.pop("to"), **order)
        print(json.dumps([found, loop.time() - began]), flush=True)
    await peers.stop()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
