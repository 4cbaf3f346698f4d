"""What the methods are worth: `python -m benchmarks.methods [TASK ...] [--seconds N]`.

CPRD, DBL and UniME against their controls, as small heads on frozen features (`benchmarks.methods_arms`). Per arm the
temperature, and what else the arm has to choose, is picked on a validation part of train with one seed; five seeds are
then measured on the unseen part. Every run is a line of .bench/methods/runs.jsonl under the digest of its setting,
so that a stopped grid goes on where it was; --seconds stops it on purpose. Where all runs of a task are there, its
figures go to docs/methods.json, and the page docs/methods.md is written from that (`benchmarks.methods_page`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.methods_arms import (
    Abstracts,
    Alike,
    Boosted,
    Films,
    Heads,
    Result,
    Sections,
    Setting,
    Task,
    fit,
    measured,
    trained,
)
from benchmarks.methods_features import KEPT, claims, cranfield, pictures, reports, reworded
from benchmarks.methods_fusion import matcher
from benchmarks.methods_measure import difference
from benchmarks.methods_page import PAGE, write_page

SEEDS = range(5)
TAUS = (0.02, 0.05, 0.1, 0.2)
DOCS = Path("docs")
RANKED = ("none", "KL", "ListMLE", "CPRD hard", "CPRD random", "CPRD easy")
ARMS = {
    "abstracts": RANKED,
    "alike": (*RANKED, "TDD", "TDD alone"),
    "films": RANKED,
    "fusion": RANKED,
    "boosting": (
        "continued", "margin 0.3", "margin 0.4", "imitation",
        "absolute offline", "absolute online", "absolute momentum",
        "relative offline", "relative online", "relative momentum",
        "relative hardest offline", "relative adapted offline",
    ),
    "sections": ("all", "top-k filtered", "top-k", "k random", "k easy"),
}  # fmt: skip
CHOSEN_BY = {
    "abstracts": "nDCG@10",
    "alike": "nDCG@10",
    "films": "graded nDCG@10",
    "fusion": "image_reports RR",
    "sections": "RR",
}
FINAL = {"abstracts": "test"}  # the part that five seeds are measured on; dev elsewhere


class Runs:
    """Finished runs on disk, one line each."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.until = path, time.monotonic() + seconds
        self.known: dict[str, Result] = {}
        self._data: dict[int, str] = {}
        if path.exists():
            for line in path.read_text("utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # a line that a stopped run left half written
                self.known[row["key"]] = Result(row["values"], row["gradient"])

    def get(self, task: Task, how: Setting, start: Heads | None = None) -> Result:
        """The figures of a setting, computed where they are missing."""
        key = self._key(task, how)
        if key not in self.known:
            if time.monotonic() > self.until:
                sys.exit("stopped on purpose: the same command goes on from here")
            if isinstance(task, Boosted) and start is not None:
                task.begin(how, start)
            began = time.process_time()
            self.known[key] = result = fit(task, how, start)
            line = {"key": key, "setting": asdict(how), "cpu_s": round(time.process_time() - began, 2)}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line | result._asdict()) + "\n")
            print(
                f"{how.task:10s} {how.arm:24s} tau {how.tau} seed {how.seed} {how.part} {line['cpu_s']} s", flush=True
            )
        return self.known[key]

    def _key(self, task: Task, how: Setting) -> str:
        """Of the setting and the features: other towers or concepts are measured anew."""
        if id(task) not in self._data:
            self._data[id(task)] = _digest(task)
        said = json.dumps(asdict(how) | {"data": self._data[id(task)]}, sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:16]


def _digest(task: Task) -> str:
    found = hashlib.sha256()
    for name, value in sorted(vars(task).items()):
        if isinstance(value, torch.Tensor):
            found.update(name.encode() + np.ascontiguousarray(value.numpy()).tobytes())
    return found.hexdigest()[:16]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(ARMS)}; all by default")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long; go on another time")
    given = parser.parse_args(arguments)
    if unknown := set(given.tasks) - set(ARMS):
        parser.error(f"no task {', '.join(sorted(unknown))}; there are {', '.join(ARMS)}")
    torch.set_num_threads(1)
    KEPT.mkdir(parents=True, exist_ok=True)
    runs = Runs(KEPT / "runs.jsonl", given.seconds)
    for name in given.tasks or ARMS:
        found = MEASURED[name](runs)
        figures = (
            json.loads(PAGE.with_suffix(".json").read_text("utf-8")) if PAGE.with_suffix(".json").exists() else {}
        )
        PAGE.with_suffix(".json").write_text(json.dumps(figures | {name: found}, indent=1) + "\n", encoding="utf-8")
        write_page()


# ---- tasks


def ranked(name: str, task: Any, runs: Runs) -> dict[str, Any]:
    """CPRD and what it is measured against, on one task."""
    part = FINAL.get(name, "dev")
    results, chosen = {}, {}
    for arm in ARMS[name]:
        best = max(choices(name, arm), key=lambda how: mean(runs.get(task, how), CHOSEN_BY[name]))
        chosen[arm] = best
        results[arm] = [runs.get(task, replace(best, part=part, seed=seed)) for seed in SEEDS]
    untouched = measured(task, Heads(task.dim, task.shared), part)
    return {
        "part": part,
        "main": CHOSEN_BY[name],
        "teacher": task.taught(part)._asdict(),
        "teacher on validate": task.taught("validate")._asdict(),
        "untouched": {measure: float(np.nanmean(values)) for measure, values in untouched.items()},
        "arms": {arm: row(results[arm], results["none"], chosen[arm]) for arm in ARMS[name]},
    }


def choices(name: str, arm: str) -> Iterable[Setting]:
    """The settings that an arm may choose among: eight each, four without a teacher."""
    for tau in TAUS:
        plain = Setting(name, arm, tau=tau)
        if arm == "none":
            yield plain
        elif arm == "KL" or arm.startswith("TDD"):  # the teacher's temperature, or KL would lose by ours
            yield from (replace(plain, teacher_tau=t) for t in (0.05, 0.2))
        else:
            yield from (replace(plain, weight=w) for w in (0.3, 1.0))


def boosting(runs: Runs) -> dict[str, Any]:
    """DBL: every arm goes on from one baseline for as many steps, five seeds."""
    task = Boosted(reports(), pictures())
    results: dict[str, list[Result]] = {arm: [] for arm in ARMS["boosting"]}
    for seed in SEEDS:
        start, _ = trained(task, Setting("boosting", "baseline", seed=seed))
        for arm in results:
            results[arm].append(runs.get(task, Setting("boosting", arm, "dev", seed + 100), start))
    return {
        "part": "dev",
        "arms": {arm: row(found, results["continued"], None) for arm, found in results.items()},
    }


def sections(runs: Runs) -> dict[str, Any]:
    """UniME stage 2: which negatives, and what the filter is worth among injected false ones."""
    texts = reports()
    task, part = Sections(texts, reworded(texts)), "dev"
    chosen = {}
    for arm in ARMS["sections"]:
        settings = [Setting("sections", arm, tau=tau, beta=_beta(arm)) for tau in TAUS]
        chosen[arm] = max(settings, key=lambda how: mean(runs.get(task, how), "RR"))

    def five(how: Setting) -> list[Result]:
        return [runs.get(task, replace(how, part=part, seed=seed)) for seed in SEEDS]

    arms: dict[str, dict[str, Any]] = {}
    for injected in (0.0, 0.1, 0.2, 0.3):
        plain = five(replace(chosen["all"], injected=injected))
        for arm in ARMS["sections"]:
            if injected in (0.0, 0.2) or not arm.startswith("k "):
                found = five(replace(chosen[arm], injected=injected))
                arms.setdefault(arm, {})[str(injected)] = row(found, plain, chosen[arm])
    sweep: dict[str, dict[str, Any]] = {}
    for injected in (0.0, 0.2):
        plain = five(replace(chosen["top-k"], injected=injected))
        for beta in (-0.1, 0.0, 0.1, 0.2, None):
            how = replace(chosen["top-k filtered"], beta=beta, injected=injected)
            sweep.setdefault(str(injected), {})[str(beta)] = row(five(how), plain, how)
    return {"part": part, "injected": arms, "beta": sweep}


def fusion(runs: Runs) -> dict[str, Any]:
    """Films again, taught by a cross-encoder, where that is better than what it would teach."""
    texts, films = reports(), pictures()
    task = Films(texts, films, matcher(texts, films))
    taught = task.taught("validate")
    if taught.teacher_ndcg <= taught.student_ndcg:
        return {"part": "dev", "teacher": task.taught("dev")._asdict(), "teacher on validate": taught._asdict()}
    return ranked("fusion", task, runs)


def _beta(arm: str) -> float | None:
    return 0.1 if arm == "top-k filtered" else None


MEASURED: dict[str, Any] = {
    "abstracts": lambda runs: ranked("abstracts", Abstracts(claims(), graded=cranfield()), runs),
    "alike": lambda runs: ranked("alike", Alike(reports()), runs),
    "sections": sections,
    "boosting": boosting,
    "films": lambda runs: ranked("films", Films(reports(), pictures()), runs),
    "fusion": fusion,
}


def mean(result: Result, measure: str) -> float:
    return float(np.nanmean(result.values[measure]))


def row(found: Sequence[Result], plain: Sequence[Result], how: Setting | None) -> dict[str, Any]:
    """An arm's means over seeds and queries, its spread over seeds, and what it is worth beside the plain arm."""
    out: dict[str, Any] = {"gradient": float(np.mean([r.gradient for r in found])), "measures": {}}
    for measure in found[0].values:
        ours, theirs = (np.array([r.values[measure] for r in rs], np.float64) for rs in (found, plain))
        kept = ~(np.isnan(ours).any(0) | np.isnan(theirs).any(0))
        out["measures"][measure] = {
            "mean": float(ours[:, kept].mean()),
            "spread": float(ours[:, kept].mean(1).std()),
            "difference": difference(ours[:, kept], theirs[:, kept])._asdict(),
        }
    if how is not None:
        out["chosen"] = {"tau": how.tau, "weight": how.weight, "teacher_tau": how.teacher_tau}
    return out


if __name__ == "__main__":
    main()
