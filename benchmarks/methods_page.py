"""Writes docs/methods.md and its plots from docs/methods.json: `python -m benchmarks.methods_page`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE = Path("docs") / "methods.md"
Figures = Mapping[str, Any]

TITLES = {
    "abstracts": "CPRD: claims find abstracts (SciFact)",
    "alike": "CPRD and UniME stage 1: reports find reports",
    "films": "CPRD: films find reports",
    "fusion": "CPRD: films find reports, taught by a cross-encoder",
    "boosting": "DBL: films find reports",
    "sections": "UniME stage 2: findings find their impression",
}
ABOUT = {
    "abstracts": """The untouched student is the packaged MiniLM. Four fifths of the 809 claims of train teach, a
fifth chooses, the 300 test claims are measured. The teacher is BM25 and cosine fused, a scorer of another family than
the student; its one constant was chosen on the claims that teach. Candidates: the untouched student's 16 nearest wrong
ones; 16 random; the 16 farthest. `agreement`: pairs among the 16 nearest of an unseen claim that the student
orders as the teacher does. `order on Cranfield`: judged pairs of different grade that are in order, in a collection
which nothing learned from. There, what learned from claims orders a little worse than the untouched student, and with
a teacher 0.002 to 0.006 less so than without; of these only the interval of CPRD easy, 0.000 to 0.012, is above 0.""",
    "alike": """Contrast: findings and impression of one report belong together, equal texts being equally right.
Teacher: the ontology's Tversky matrix over the texts of whole reports. `nDCG@10` is that of `report_reports` (grade 2
the same findings, 1 an overlap, by human coding); `order`: graded pairs among the 40 nearest of the untouched encoder
that are in order. TDD is UniME's stage 1 on the same matrix, beside the contrast and alone.""",
    "films": """Features: the shipped film tower and the text encoder that it is aligned to; the tower has seen the
films of train, so that the heads start from pairs that look easier than unseen ones are. Teacher: the Tversky matrix
of the reports, so that a film is taught by what its own report says; both directions. A query counts as found at k
where any report with the right text (any film with it) is among the first k. `graded nDCG@10`: other reports with the
same findings, by human coding.""",
    "fusion": """The same films and reports; the teacher is a fusion cross-encoder of ours (`encoders.fusion`) over the
same frozen features: a film is one token, the whole report, its findings and its impression are three. It was trained
on the pairs that teach with one hard negative each way, and is asked for every mined pair.""",
    "boosting": """Same features. A baseline with hinge losses (margin 0.2, summed over the negatives of a batch of 64,
texts that are equal never negatives of one another); every arm goes on from it for as many steps again, the baseline
too. Imitation is KL to the frozen baseline at scale 10. `rSum` is the sum of the six R@k in points; `separation` how
far an unseen pair stands above its best negative, in cosine.""",
    "sections": """Findings find the impression of the same report, batch 64, k 8; a fifth of the steps is a warm-up
with all negatives for every arm. Injected candidates say in other words what the positive of some row of the batch
says, and no id gives them away; equal texts are removed by id in every arm. `gradient`: mean norm after the warm-up,
before clipping, at the temperature that the arm chose.""",
}


def write_page() -> None:
    figures = json.loads(PAGE.with_suffix(".json").read_text("utf-8"))
    parts = [HEAD]
    for name, title in TITLES.items():
        if name in figures:
            parts += [f"## {title}\n", ABOUT[name].replace("\n", " ") + "\n", *SECTIONS[name](name, figures[name])]
    PAGE.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")


HEAD = """# The methods, measured

`python -m benchmarks.methods` measures everything on this page (it needs the development data, see
[sources](sources.md)); it goes on where it was stopped. Residual heads of one hidden layer are trained on vectors of
frozen encoders: the same start (the identity), 100 steps, batch of 64 and Adam for every arm, so that only the loss
differs. Each arm chooses its temperature from 0.02, 0.05, 0.1 and 0.2, and one other constant (the weight of its term,
0.3 or 1; KL and TDD: the teacher's temperature, 0.05 or 0.2), on a validation part of train with one seed; five seeds
are then measured on queries that nothing was chosen on. Differences are against the arm without a teacher at *its*
best temperature: means over seeds, with a 95 % paired bootstrap interval over queries, and in how many of the five
seeds the arm was better. Where an interval includes 0, nothing was shown. A distilling arm reads 16 candidates of each
of 32 queries a step. End-to-end results are in [text towers](students.md).
"""


def _ranked(name: str, found: Figures) -> Iterable[str]:
    yield from _teacher(found)
    if "arms" not in found:
        yield "On `validate` it is no better than the towers either, so no arm was trained by it.\n"
        return
    measures = list(found["untouched"])
    main = found["main"]
    shown = [main] + [m for m in measures if m != main and not m.endswith("report_images RR")]
    head = ["arm", *shown, f"{main} against none", "seeds", "tau", "other"]
    rows = [["untouched encoder", *(f"{found['untouched'][m]:.3f}" for m in shown), "", "", "", ""]]
    for arm, row in found["arms"].items():
        rows.append([arm, *(_mean(row, m) for m in shown), *_gain(row, main, arm == "none"), *_chosen(arm, row)])
    yield _table(head, rows)
    yield _verdicts(found["arms"], main, "none")
    yield _forest(name, found["arms"], main, "none")


def _teacher(found: Figures) -> Iterable[str]:
    taught = found["teacher"]
    if taught["teacher_ndcg"] <= taught["student_ndcg"]:
        yield "**The teacher is no better than the student on the student's own candidates: expect no help of it.**\n"
    yield (
        "On the untouched student's first 50 candidates, over the "
        f"{taught['queries']} queries that have a right one there, the teacher's nDCG@10 is "
        f"{taught['teacher_ndcg']:.3f} and the student's {taught['student_ndcg']:.3f}; of the pairs with different "
        f"grades the teacher has {taught['teacher_order']:.3f} in order, the student {taught['student_order']:.3f} "
        "(chance 0.5).\n"
    )


def _boosting(name: str, found: Figures) -> Iterable[str]:
    rows = []
    for arm, row in found["arms"].items():
        sums = _r_sum(row)
        rows.append([
            arm, f"{sums[0]:.1f}", "" if arm == "continued" else f"{sums[1]:+.1f}",
            _mean(row, "image_reports RR"), *_gain(row, "image_reports RR", arm == "continued"),
            _mean(row, "separation"), *_gain(row, "separation", arm == "continued"),
        ])  # fmt: skip
    yield _table(
        ["arm", "rSum", "gain", "RR of `image_reports`", "against continued", "seeds", "separation",
         "against continued", "seeds"], rows,
    )  # fmt: skip
    yield _verdicts(found["arms"], "separation", "continued")
    yield _verdicts(found["arms"], "image_reports RR", "continued")
    yield _forest(name, found["arms"], "separation", "continued")


def _r_sum(row: Figures) -> tuple[float, float]:
    recalls = [m for name, m in row["measures"].items() if "R@" in name]
    return 100 * sum(m["mean"] for m in recalls), 100 * sum(m["difference"]["value"] for m in recalls)


def _sections(name: str, found: Figures) -> Iterable[str]:
    for measure in ("RR", "R@1", "graded nDCG@10"):
        yield f"### Which negatives: {measure}\n"
        shares = list(found["injected"]["all"])
        rows = []
        for arm, by_share in found["injected"].items():
            cells = [_with_gain(by_share.get(share), measure, arm == "all") for share in shares]
            rows.append([arm, *cells, str(by_share["0.0"]["chosen"]["tau"])])
        yield _table(["arm", *(f"{float(s):.0%} injected" for s in shares), "tau"], rows)
    yield "Differences against all in-batch negatives with as many injected.\n"
    yield "### Gradient norms\n"
    yield _table(
        ["arm", "mean norm, nothing injected"],
        [[arm, f"{by['0.0']['gradient']:.4f}"] for arm, by in found["injected"].items()],
    )
    yield "### The threshold\n"
    betas = list(found["beta"]["0.0"])
    rows = [
        [f"{float(share):.0%} injected, {measure}", *(_with_gain(by[b], measure, b == "None") for b in betas)]
        for share, by in found["beta"].items()
        for measure in ("RR", "graded nDCG@10")
    ]
    yield _table(["", *(f"beta {b}" if b != "None" else "no filter" for b in betas)], rows)
    yield "Differences against no filter.\n"
    yield _lines(name, found)


SECTIONS = {
    "abstracts": _ranked,
    "alike": _ranked,
    "films": _ranked,
    "boosting": _boosting,
    "fusion": _ranked,
    "sections": _sections,
}


# ---- cells


def _mean(row: Figures, measure: str) -> str:
    found = row["measures"][measure]
    return f"{found['mean']:.3f} ± {found['spread']:.3f}"


def _gain(row: Figures, measure: str, plain: bool) -> list[str]:
    """The difference with its interval, and the seeds in which the arm is better."""
    if plain:
        return ["", ""]
    d = row["measures"][measure]["difference"]
    return [f"{d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]", f"{d['wins']}/5"]


def _with_gain(row: Figures | None, measure: str, plain: bool) -> str:
    if row is None:
        return ""
    return " ".join([f"{row['measures'][measure]['mean']:.3f}", _gain(row, measure, plain)[0]]).strip()


def _chosen(arm: str, row: Figures) -> list[str]:
    chosen = row["chosen"]
    if arm == "none":
        return [str(chosen["tau"]), ""]
    kl = arm == "KL" or arm.startswith("TDD")
    return [str(chosen["tau"]), f"teacher's tau {chosen['teacher_tau']}" if kl else f"weight {chosen['weight']}"]


def _verdicts(arms: Figures, measure: str, plain: str) -> str:
    """What the intervals say, in words."""
    groups: dict[str, list[str]] = {"better than": [], "worse than": [], "not shown to differ from": []}
    for arm, row in arms.items():
        if arm != plain:
            d = row["measures"][measure]["difference"]
            kind = "better than" if d["low"] > 0 else "worse than" if d["high"] < 0 else "not shown to differ from"
            groups[kind].append(arm)
    said = [f"{kind} {plain}: {', '.join(names)}" for kind, names in groups.items() if names]
    return f"By the intervals of {measure}, " + "; ".join(said) + ".\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


# ---- plots


def _figure(width: float, height: float) -> tuple[Any, Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height))
    axes.spines[["top", "right"]].set_visible(False)
    return pyplot, figure, axes


def _saved(pyplot: Any, figure: Any, name: str, said: str) -> str:
    figure.tight_layout()
    figure.savefig(PAGE.with_name(f"methods-{name}.png"), dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return f"![{said}](methods-{name}.png)\n"


def _forest(name: str, arms: Figures, measure: str, plain: str) -> str:
    names = [arm for arm in arms if arm != plain][::-1]
    pyplot, figure, axes = _figure(6.4, 0.8 + 0.3 * len(names))
    for place, arm in enumerate(names):
        d = arms[arm]["measures"][measure]["difference"]
        axes.plot([d["low"], d["high"]], [place, place], color="#55606e", linewidth=2)
        axes.plot(d["value"], place, "o", color="#1f5fa8")
    axes.axvline(0, color="#999999", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(f"{measure}, difference to {plain} (95 % interval over queries)")
    return _saved(pyplot, figure, name, f"{measure} of every arm against {plain}")


def _lines(name: str, found: Figures) -> str:
    pyplot, figure, axes = _figure(6.4, 3.4)
    for arm, by_share in found["injected"].items():
        shares = [float(share) for share in by_share]
        if len(shares) > 2:
            axes.plot(shares, [by["measures"]["RR"]["mean"] for by in by_share.values()], "o-", label=arm)
    axes.set_xlabel("share of injected false negatives")
    axes.set_ylabel("RR")
    axes.legend(frameon=False)
    return _saved(pyplot, figure, name, "RR over the share of injected false negatives")


if __name__ == "__main__":
    write_page()
