"""`ckptd run` whose keeper hears Acts from a file too: what a daemon would send it, before it knows any verdict.

    python acting_run.py python -m ckptd.cli.main run ...

Lines of JSON that are appended to $ACTS become wire.Act, by the keeper's own ears (`Keeper._take`); what it answers is appended to $ACTED.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

from ckptd import launch
from ckptd.cli.main import main
from ckptd.core import wire


class Keeper(launch.Keeper):
    """One that writes down what it answers."""

    def answer(self, acted: wire.Acted) -> None:
        line = json.dumps({"t": time.time(), "pid": os.getpid(), "verdict": acted.verdict, "done": acted.done, "what": acted.what}) + "\n"
        with open(os.environ["ACTED"], "a") as f:
            f.write(line)
        super().answer(acted)


def listen() -> None:
    path, seen = Path(os.environ["ACTS"]), 0
    while True:
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines[seen:]:
            launch.Agent.keeper._take(None, wire.Act(**json.loads(line)))
        seen = len(lines)
        time.sleep(0.02)


if __name__ == "__main__":
    vars(launch)["Keeper"] = Keeper
    threading.Thread(target=listen, daemon=True).start()
    sys.exit(main(sys.argv[sys.argv.index("run") :]))
