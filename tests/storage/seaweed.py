"""SeaweedFS, a real server of the S3 protocol, on loopback ports of its own: start, make buckets, stop what was started."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import timedelta
from pathlib import Path

from tests.ports import free_ports

READY_AFTER_S = 60.0
KEY, SECRET = "ckptd-key", "ckptd-secret"


def weed_path() -> str | None:
    """Where the server's program is: beside this interpreter, or on PATH."""
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


class Seaweed:
    """One server with its files below `folder`."""

    def __init__(self, folder: Path) -> None:
        (folder / "data").mkdir()
        identity = {"name": "ckptd", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin", "Read", "Write", "List"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self._ports = ports = free_ports(8)
        self.s3_port, self.filer_port = ports[:2]
        names = ["s3.port", "filer.port", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port.grpc", "s3.port.grpc"]
        options = dict(zip(names, ports, strict=True)) | {
            "dir": folder / "data", "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "s3.config": folder / "s3.json", "s3.port.iceberg": 0, "s3.port.lance": 0, "s3.iam": "false",
            "s3.autoCreateBucket": "false", "master.volumeSizeLimitMB": 64, "volume.max": 40, "master.telemetry": "false"}  # fmt: skip
        with (folder / "log").open("w") as log:
            command = [weed_path(), "server", "-s3", *(f"-{k}={v}" for k, v in options.items())]
            self.process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=os.environ | {"GOMAXPROCS": "2"})
        self.log = folder / "log"
        self.environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.s3_port}", "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET,
                            "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1"}  # fmt: skip

    def make_bucket(self, bucket: str) -> None:
        """Waits until the server is up to it."""
        import obstore
        from obstore.store import S3Store

        config = {"endpoint": self.environment["AWS_ENDPOINT_URL"], "access_key_id": KEY, "secret_access_key": SECRET, "allow_http": "true"}
        store = S3Store(bucket, config=config)
        deadline = time.monotonic() + READY_AFTER_S
        while True:
            try:
                urllib.request.urlopen(urllib.request.Request(obstore.sign(store, "PUT", "", timedelta(minutes=5)), method="PUT"), timeout=10).close()
                obstore.put(store, "ready", b"ready")
                return obstore.delete(store, "ready")
            except Exception as e:
                if isinstance(e, urllib.error.HTTPError):
                    e.close()
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise RuntimeError(f"SeaweedFS does not come up: {self.log.read_text()[-3000:]}") from e
                time.sleep(0.2)

    def unfinished_uploads(self, bucket: str) -> list[str]:
        """What the server keeps of multipart uploads that were neither completed nor aborted."""
        url = f"http://127.0.0.1:{self.filer_port}/buckets/{bucket}/.uploads/"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": "application/json"}), timeout=10) as answer:
                return [e["FullPath"] for e in json.load(answer)["Entries"] or []]
        except urllib.error.HTTPError as e:
            e.close()
            assert e.code == 404, e
            return []

    def stop(self) -> None:
        """At once: it says goodbye to itself for half a minute otherwise, and its files are ours to throw away."""
        self.process.kill()
        self.process.wait(20)
        for port in self._ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)
