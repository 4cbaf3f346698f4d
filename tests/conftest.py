"""What all tests share: where the data are, what is skipped and why, and no network."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]

# Models come from packages and files; a test that would fetch one must fail instead.
os.environ.update(
    HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false"
)
os.environ.setdefault("LIGHTBOX_DATA", str(ROOT.parent / "shared" / "data"))
for name in ("LIGHTBOX_HOME", "LIGHTBOX_API_KEYS", "LIGHTBOX_DEBUG"):
    os.environ.pop(name, None)  # what the developer has set must not decide a test

settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("long", deadline=None, max_examples=2000, suppress_health_check=list(HealthCheck))
settings.load_profile("long" if os.environ.get("LIGHTBOX_TESTS") == "long" else "default")

_skipped: Counter[str] = Counter()


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of development data; tests that need it are skipped where it is missing."""
    folder = Path(os.environ["LIGHTBOX_DATA"])
    if not folder.is_dir():
        pytest.skip("no development data (LIGHTBOX_DATA)")
    return folder


@pytest.fixture(scope="session")
def elasticsearch() -> Iterator[str]:
    """The URL of a real server, started once for the whole run (or of one that LIGHTBOX_TEST_ES names)."""
    from tests.elastic_server import Cluster, Unavailable

    if url := os.environ.get("LIGHTBOX_TEST_ES"):
        yield url
        return
    try:
        cluster = Cluster()
    except Unavailable as error:
        skip_without("es", str(error))
    yield cluster.url
    cluster.stop()


def required(what: str) -> bool:
    """True where LIGHTBOX_REQUIRE names `what` ("es", "browser"): its absence is then a failure."""
    return what in os.environ.get("LIGHTBOX_REQUIRE", "").split(",")


def skip_without(what: str, reason: str) -> None:
    """Skips the test, or fails it where LIGHTBOX_REQUIRE names `what`."""
    if required(what):
        pytest.fail(f"LIGHTBOX_REQUIRE names {what}, but {reason}")
    pytest.skip(reason)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skipped[reason.removeprefix("Skipped: ")] += 1


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skipped[reason.removeprefix("Skipped: ")] += 1


def pytest_unconfigure() -> None:
    """The last line of the run: what was skipped, and why."""
    if _skipped:
        print("skipped: " + "; ".join(f"{count} x {reason}" for reason, count in sorted(_skipped.items())))
    else:
        print("skipped: nothing")
