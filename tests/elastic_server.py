"""A real Elasticsearch on free loopback ports, for as long as tests need it.

The distribution is the one that Elastic publishes for integration tests; Maven fetches it once into `.es/`. It runs as
an ordinary user (Elasticsearch refuses root), without security, in a folder of its own that goes with it.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import ZipFile

VERSION = "8.19.0"
ARTIFACT = f"org.elasticsearch.distribution.integ-test-zip:elasticsearch:{VERSION}:zip"
CACHE = Path(__file__).resolve().parents[1] / ".es"
START_S = 300.0
ORDINARY = "nobody"  # who runs it where we are root
# Tests share two cores: the quick compiler alone starts in a third of the processor time.
TESTED = "-Xms512m -Xmx512m -XX:TieredStopAtLevel=1 -XX:CICompilerCount=1 -XX:ActiveProcessorCount=2"

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback goes through no proxy


class Unavailable(Exception):
    """The server cannot be had here; says why."""


def distribution() -> Path:
    """The zip file, fetched by Maven where it is not there yet."""
    for tool in ("java", "mvn"):
        if shutil.which(tool) is None:
            raise Unavailable(f"Elasticsearch needs {tool} (openjdk-17-jre-headless and maven)")
    found = CACHE / f"elasticsearch-{VERSION}.zip"
    if found.exists():
        return found
    fresh = CACHE / f"fresh-{os.getpid()}"
    command = ["mvn", "-q", "-B", "dependency:copy", f"-Dartifact={ARTIFACT}", f"-DoutputDirectory={fresh}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    made = fresh / found.name
    if not made.exists():
        shutil.rmtree(fresh, ignore_errors=True)
        raise Unavailable(f"Maven could not fetch {ARTIFACT}: {' '.join((done.stdout + done.stderr).split())[-300:]}")
    made.replace(found)  # whole or not at all
    shutil.rmtree(fresh, ignore_errors=True)
    return found


class Node:
    """One server process with its own data, and the ways to hurt it."""

    def __init__(self, home: Path, folder: Path, settings: Mapping[str, Any], java_options: str) -> None:
        self.home = home
        self.folder = folder
        self.java_options = java_options
        self.port, self.transport = _free_port(), _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        for name in ("config", "tmp", "data", "logs"):
            (folder / name).mkdir(parents=True)
        for file in ("jvm.options", "log4j2.properties"):
            shutil.copyfile(home / "config" / file, folder / "config" / file)
        (folder / "config" / "jvm.options.d").mkdir()

    def start(self) -> None:
        """Starts the process; `wait` says when it answers."""
        if self._process is not None:
            return
        lines = {
            "node.name": self.folder.name,
            "network.host": "127.0.0.1",
            "http.port": self.port,
            "transport.port": self.transport,
            "path.data": str(self.folder / "data"),
            "path.logs": str(self.folder / "logs"),
            "xpack.security.enabled": False,
            **self.settings,
        }
        text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items())
        (self.folder / "config" / "elasticsearch.yml").write_text(text)
        _give_away(self.folder)
        java = Path(shutil.which("java") or "java").resolve().parents[1]
        env = {
            "PATH": os.environ["PATH"],
            "ES_JAVA_HOME": str(java),
            "ES_PATH_CONF": str(self.folder / "config"),
            "ES_TMPDIR": str(self.folder / "tmp"),
            "ES_JAVA_OPTS": self.java_options,
            "CLI_JAVA_OPTS": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
        }
        user = {"user": ORDINARY, "group": pwd.getpwnam(ORDINARY).pw_gid, "extra_groups": []} if _root() else {}
        with (self.folder / "output.log").open("ab") as output:
            self._process = subprocess.Popen(
                [str(self.home / "bin" / "elasticsearch")],
                env=env, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True, **user,
            )  # type: ignore[call-overload]  # fmt: skip

    def wait(self, nodes: int = 1) -> None:
        """Returns once a cluster of `nodes` answers here; Unavailable where the process ends or time runs out."""
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            if self._process is None or self._process.poll() is not None:
                break
            try:
                if ask(self.url, "/_cluster/health?timeout=1s")["number_of_nodes"] >= nodes:
                    return
            except (OSError, KeyError):
                pass
            time.sleep(0.2)
        said = (self.folder / "output.log").read_text(errors="replace").split()
        raise Unavailable(f"Elasticsearch did not start within {START_S:.0f} s: {' '.join(said)[-400:]}")

    def signal(self, number: signal.Signals) -> None:
        """SIGSTOP pauses the node, SIGCONT lets it go on."""
        if self._process is not None:
            os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """kill -9, as a machine that loses its power."""
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        if self._process is None:
            return
        self.signal(signal.SIGCONT)
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(15)
        if self._process.poll() is None or _lives(self._process.pid):
            self.signal(signal.SIGKILL)
        self._process.wait()
        self._process = None


class Cluster:
    """Nodes that know one another."""

    def __init__(self, size: int = 1, settings: Mapping[str, Any] | None = None, java_options: str = TESTED) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="lightbox-es-"))
        try:
            with ZipFile(distribution()) as archive:
                archive.extractall(self._folder)
            home = self._folder / f"elasticsearch-{VERSION}"
            for file in home.rglob("bin/*"):
                file.chmod(0o755)
            self.nodes = [Node(home, self._folder / f"node-{n}", {}, java_options) for n in range(size)]
            _give_away(self._folder)
            shared = {
                "cluster.name": self._folder.name,
                "cluster.routing.allocation.disk.threshold_enabled": False,
                "action.destructive_requires_name": False,
                **_discovery(self.nodes),
                **(settings or {}),
            }
            for node in self.nodes:
                node.settings = shared
                node.start()
            for node in self.nodes:
                node.wait(size)
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        return self.nodes[0].url

    @property
    def urls(self) -> list[str]:
        return [node.url for node in self.nodes]

    def stop(self) -> None:
        for node in getattr(self, "nodes", ()):
            node.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


def ask(url: str, path: str, method: str = "GET", body: object = None, timeout: float = 10.0) -> Any:
    """One request, JSON in and out; OSError where there is no good answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"}, method=method)
    with _direct.open(request, timeout=timeout) as answer:
        return json.loads(answer.read() or b"null")


def _discovery(nodes: Sequence[Node]) -> dict[str, Any]:
    if len(nodes) == 1:
        return {"discovery.type": "single-node"}
    return {
        "discovery.seed_hosts": [f"127.0.0.1:{node.transport}" for node in nodes],
        "cluster.initial_master_nodes": [node.folder.name for node in nodes],
    }


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _root() -> bool:
    return os.geteuid() == 0


def _give_away(folder: Path) -> None:
    """The files of a server belong to who runs it."""
    if _root():
        owner = pwd.getpwnam(ORDINARY)
        for path in (folder, *folder.rglob("*")):
            os.chown(path, owner.pw_uid, owner.pw_gid, follow_symlinks=False)


def _lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
