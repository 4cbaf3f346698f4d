"""The command line: parse, call one verb, print.

Heavy imports live inside the commands, so that `search` starts fast.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrieval.errors import InputError, Invalid, NotFound, RetrievalError
from server import terminal
from server.terminal import say

if TYPE_CHECKING:
    from indexers.rebuild import Summary
    from retrieval.files import Source
    from retrieval.request import RequestPart
    from retrieval.types import Document, Rejected, Snapshot
    from server.home import Home
    from server.settings import Settings

app = typer.Typer(
    name="lightbox",
    help="Search pictures, texts and radiology reports; index, evaluate, train and serve.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Name = Annotated[str, typer.Argument(metavar="COLLECTION", show_default=False)]
Folder = Annotated[Path, typer.Argument(metavar="SOURCE", show_default=False, help="Folder, CSV or JSONL file.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")]
Spec = Annotated[str | None, typer.Option(metavar="SPEC", help="flat, hnsw, hnsw-sq8, ivfpq:M=24,nlist=256, …")]
Mapped = Annotated[
    str | None, typer.Option("--columns", metavar="JSON", help='For CSV and JSONL: {"text": "column", …}')
]
Measures = Annotated[str, typer.Option(help="Named as ir-measures names them.")]
WeightsJson = Annotated[str | None, typer.Option("--weights", metavar="JSON", help='{"lexical": 0.4, "dense": 0.6}')]

_home_option: list[Path | None] = [None]


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    home: Annotated[
        Path | None, typer.Option(help="Where collections live; default LIGHTBOX_HOME or ./lightbox-data.")
    ] = None,
) -> None:
    _home_option[0] = home
    if context.invoked_subcommand is None:
        print(context.get_help())


# --- collections -------------------------------------------------------------------------------------------------


@app.command()
def index(
    collection: Name,
    source: Folder,
    text_encoder: Annotated[str | None, typer.Option(metavar="NAME|PATH|none")] = None,
    image_encoder: Annotated[str | None, typer.Option(metavar="NAME|PATH|none")] = None,
    reranker: Annotated[str | None, typer.Option(metavar="NAME|PATH")] = None,
    ontology: Annotated[str | None, typer.Option(metavar="chest|PATH|none")] = None,
    backend: Annotated[
        str | None, typer.Option(metavar="embedded|URL", help="Default: where it lives; a new one embedded.")
    ] = None,
    vector_index: Spec = None,
    frames: Annotated[str, typer.Option(help="Of a multi-frame DICOM file: middle or all.")] = "middle",
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Only encode part I of N; run without to publish.")
    ] = None,
    strict: Annotated[bool, typer.Option(help="Stop at the first bad item instead of leaving it out.")] = False,
    columns: Mapped = None,
) -> None:
    """Make COLLECTION equal to SOURCE, as a new generation."""
    from server.assemble import Config
    from server.backends import check_backend
    from server.home import usable

    if backend is not None:
        check_backend(backend)
    if frames not in ("middle", "all"):
        raise Invalid(f"--frames: got '{frames}', expected middle or all")
    part = _shard(shard)
    config = Config.given(
        text_encoder=text_encoder,
        image_encoder=image_encoder,
        reranker=reranker,
        ontology=ontology,
        frames=frames,
        vector_index=vector_index or "flat",
    )
    documents = _source(source, columns)
    with terminal.progress(_lines(source)) as progress:
        items = usable(documents.documents(), source.name)
        done = _home().index(collection, items, config, progress=progress, strict=strict, shard=part, backend=backend)
    say(f"shard {shard} is encoded" if part else f"collection {collection}: {_summary(done)}")


@app.command()
def add(collection: Name, source: Folder, columns: Mapped = None) -> None:
    """Add the documents of SOURCE; equal ids replace."""
    documents = _source(source, columns)
    home = _home()
    with terminal.progress(_lines(source)) as progress:
        done = home.add(collection, documents.documents(), progress)
    left_out = f", {len(done.rejected)} left out (see quarantine.jsonl)" if done.rejected else ""
    say(f"collection {collection}: {done.added} added{left_out}, {done.documents} in all, {done.seconds:.1f} s")


@app.command()
def remove(collection: Name, ids: Annotated[list[str], typer.Argument(metavar="ID...", show_default=False)]) -> None:
    """Remove documents by id; unknown ids are no error."""
    say(f"collection {collection}: {_home().remove(collection, ids)} removed")


@app.command()
def delete(collection: Name) -> None:
    """Delete the whole collection."""
    _home().delete(collection)
    say(f"collection {collection}: deleted")


@app.command()
def rebuild(
    collection: Name,
    vector_index: Spec = None,
    gate: Annotated[
        Path | None, typer.Option(metavar="SOURCE", help="Judgments the new generation must satisfy.")
    ] = None,
    gate_min: Annotated[
        str | None, typer.Option(metavar="CONDITION", help="What it must reach there; default nDCG@10>=0.")
    ] = None,
) -> None:
    """Build the index anew from the stored documents and vectors, beside the old one, and swap."""
    from server import judging

    if gate_min is not None and gate is None:
        raise InputError(f"--gate-min: got '{gate_min}' without judgments to measure on; name them with --gate SOURCE")
    home = _home()
    with terminal.progress() as progress:
        least = judging.LEAST if gate_min is None else gate_min
        check = judging.gate(home.engine(collection), gate, least, progress) if gate else None
        done = home.rebuild(collection, vector_index=vector_index, gate=check, progress=progress)
    say(f"collection {collection}: {_summary(done)}")


@app.command()
def rollback(collection: Name) -> None:
    """Go back to the generation before."""
    say(f"collection {collection}: back at generation {_home().rollback(collection)}")


@app.command()
def tune(collection: Name, source: Folder, split: str = "train") -> None:
    """Learn fusion weights from judgments and store them with the collection."""
    from server import judging

    home = _home()
    with terminal.progress() as progress:
        weights, learned = judging.learn(home.engine(collection), judging.judgments(source, split), progress)
    home.keep_weights(collection, weights, learned)
    for kind, legs in weights.items():
        shares = ", ".join(f"{leg} {weight:.2f}" for leg, weight in legs.items())
        print(f"{kind}: {shares} (nDCG@10 {learned['nDCG@10'][kind]:.4f} on {split})")


@app.command()
def info(collection: Name, as_json: AsJson = False) -> None:
    """Counts, spaces, index kinds and weights of a collection."""
    found = _home().info(collection)
    print(json.dumps(found, ensure_ascii=False) if as_json else "\n".join(terminal.fields(found)))


# --- searching and measuring -------------------------------------------------------------------------------------


@app.command()
def search(
    collection: Name,
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", show_default=False)] = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="Find what is like this picture.")] = None,
    like: Annotated[str | None, typer.Option(metavar="ID", help="Find what is like this document.")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Find what says the same as this report.")
    ] = None,
    retriever: Annotated[
        str, typer.Option(metavar="NAME", help="lexical, dense, image, ontology, hybrid; …+rerank.")
    ] = "hybrid",
    k: Annotated[int, typer.Option("-k", help="How many hits.")] = 10,
    where: Annotated[
        str | None, typer.Option(metavar="JSON", help='{"projection": "ap", "year": {"$gte": 2010}}')
    ] = None,
    weights: WeightsJson = None,
    explain: Annotated[bool, typer.Option(help="Show how each score came about.")] = False,
    as_json: AsJson = False,
) -> None:
    """Search by words, by picture, by report, by a stored document, or by several of them together."""
    from retrieval.request import Request

    request = Request(
        query=_parts(text, image, like, report),
        retriever=retriever,
        k=k,
        where=_json_object(where, "--where"),
        weights=_numbers(weights),
    )
    engine = _home().engine(collection)
    answer = engine.search(request)
    if request.where and not answer["hits"]:
        for path in _unknown_fields(engine.snapshot(), request.where):
            say(f"lightbox: --where: no document of {collection} has a field '{path}'")
    lines: Iterable[str] = [json.dumps(answer, ensure_ascii=False)] if as_json else terminal.hits(answer, explain)
    for line in lines:
        print(line)


@app.command()
def evaluate(
    collection: Name,
    source: Folder,
    split: str = "test",
    retriever: Annotated[str, typer.Option(metavar="a,b,c")] = "hybrid",
    measures: Measures = "nDCG@10 R@100 RR@10",
    weights: WeightsJson = None,
    drop_identical_ids: Annotated[bool, typer.Option(help="A document with the query's id does not count.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write TREC runs and report.html there.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure retrievers against the judgments of SOURCE, with 95 % intervals."""
    from server import judging

    names = [name.strip() for name in retriever.split(",") if name.strip()]
    if not names:
        raise Invalid("--retriever: got no name, expected some of lexical, dense, image, ontology, hybrid")
    with terminal.progress() as progress:
        measured = judging.measure(
            _home().engine(collection),
            judging.judgments(source, split),
            names,
            measures.replace(",", " ").split(),
            weights=_numbers(weights),
            drop_identical_ids=drop_identical_ids,
            progress=progress,
        )
    if out is not None:
        from server.report import write

        write(measured, out)
        say(f"runs and report: {out}")
    found = measured.json()
    print(json.dumps(found, ensure_ascii=False) if as_json else "\n".join(_results(found)))


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", show_default=False)],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", show_default=False)],
    qrels: Annotated[Path, typer.Argument(metavar="QRELS", show_default=False)],
    measures: Measures = "nDCG@10 R@100 RR@10",
    as_json: AsJson = False,
) -> None:
    """Is RUN_B better than RUN_A? Paired test, interval of the difference, wins and losses per query."""
    from dataclasses import asdict

    from retrieval import evaluate as measuring
    from retrieval.files import read_qrels, read_run

    found = measuring.compare(read_run(run_a), read_run(run_b), read_qrels(qrels), measures.replace(",", " ").split())
    if as_json:
        print(json.dumps({"a": run_a.name, "b": run_b.name, "comparisons": [asdict(c) for c in found]}))
        return
    rows = [
        [
            c.measure,
            f"{c.mean_a:.4f}",
            f"{c.mean_b:.4f}",
            f"{c.difference:+.4f}",
            f"[{c.interval[0]:+.4f}, {c.interval[1]:+.4f}]",
            f"{c.p:.4f}",
            str(c.wins),
            str(c.losses),
            str(c.ties),
        ]
        for c in found
    ]
    print("\n".join(terminal.table(["", "A", "B", "B - A", "95 %", "p", "wins", "losses", "ties"], rows)))


# --- learning, labelling, serving --------------------------------------------------------------------------------


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the weights go; default: what the recipe says.")
    ] = None,
) -> None:
    """Train an encoder by a recipe; the same command again resumes."""
    from encoders.train import train as run_recipe
    from server.assemble import Config

    with terminal.progress() as progress:
        models = _home().models
        linker = models.linker(Config.given())
        run_recipe(recipe, out, progress, linker=linker, alike=models.likeness(linker))


@app.command()
def label(
    source: Folder,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: standard output.")] = None,
    ontology: Annotated[str | None, typer.Option(metavar="chest|PATH")] = None,
    labels: Annotated[str | None, typer.Option(metavar="NAME|FILE", help="A label set; default chest14.")] = None,
    columns: Mapped = None,
) -> None:
    """Write findings and labels of every document, one JSON line each."""
    from server.assemble import Config

    rejected: list[Rejected] = []
    told = 0
    with terminal.progress(_lines(source)) as progress:
        documents = _kept(_source(source, columns).documents(), rejected)

        def rows() -> Iterator[str]:
            nonlocal told
            for told, row in enumerate(_home().label(documents, Config.given(ontology=ontology), labels), 1):
                progress("label", told, None)
                yield json.dumps(row, ensure_ascii=False)

        _write(out, rows())
    say(f"{told} documents labelled" + (f", {len(rejected)} left out" if rejected else ""))


@app.command()
def serve(host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve all collections and the page over HTTP."""
    from server.app import serve as run_server

    run_server(_settings(), host, port)


# --- from words to values ----------------------------------------------------------------------------------------


def _settings() -> Settings:
    from server.settings import load

    return load(home=_home_option[0])


def _home() -> Home:
    from server.home import Home

    return Home(_settings())


def _source(path: Path, columns: str | None) -> Source:
    from retrieval.files import read_source

    mapping = _json_object(columns, "--columns")
    return read_source(path, mapping)


def _parts(text: str | None, image: Path | None, like: str | None, report: Path | None) -> list[RequestPart]:
    from retrieval.request import RequestPart

    parts = [RequestPart(text=text)] if text is not None else []
    if image is not None:
        parts.append(RequestPart(image=_file(image, "--image")))
    if like is not None:
        parts.append(RequestPart(id=like))
    if report is not None:
        parts.append(RequestPart(report=_text(report, "--report")))
    if not parts:
        raise InputError("search: got no query, expected TEXT, --image FILE, --like ID or --report FILE")
    return parts


def _unknown_fields(snapshot: Snapshot, where: Mapping[str, Any]) -> list[str]:
    """Fields that a filter names and no document has: a misspelling, most likely."""
    from retrieval import filters

    filter = filters.parse(where)
    asked = dict.fromkeys(filters.paths(filter)) if filter is not None else ()
    return [path for path in asked if not snapshot.count(filters.Exists(path))]


def _file(path: Path, option: str) -> Path:
    if not path.is_file():
        raise NotFound(f"{option}: no file '{path}'")
    return path


def _text(path: Path, option: str) -> str:
    try:
        return _file(path, option).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{option}: '{path}' is not UTF-8 text") from None


def _json_object(text: str | None, option: str) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = str(error) if isinstance(error, ValueError) else "nested too deep"
        raise Invalid(f'{option}: not JSON ({why}), expected an object such as {{"name": "value"}}') from None
    if not isinstance(value, dict):
        raise Invalid(f"{option}: got {type(value).__name__}, expected a JSON object")
    return value


def _numbers(text: str | None) -> dict[str, float] | None:
    found = _json_object(text, "--weights")
    for leg, weight in (found or {}).items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise Invalid(f"--weights: {leg} is {weight!r}, expected a number from 0")
    return found


def _shard(text: str | None) -> tuple[int, int] | None:
    """Both ways to count are right: 1 to N, and 0 to N - 1."""
    if text is None:
        return None
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(of) > 0 and int(number) <= int(of)):
        raise Invalid(f"--shard: got '{text}', expected I/N with I from 1 to N, such as 2/8")
    return int(number) % int(of), int(of)


def _kept(items: Iterable[Document | Rejected], rejected: list[Rejected]) -> Iterator[Document]:
    """The documents; the rest goes to `rejected`."""
    from retrieval.types import Document

    for item in items:
        if isinstance(item, Document):
            yield item
        else:
            rejected.append(item)


def _lines(source: Path) -> int | None:
    """How many documents a source has, where that is cheap to know."""
    file = source / "corpus.jsonl" if source.is_dir() else source
    if not file.is_file():
        return None
    with file.open("rb") as lines:
        return sum(1 for _ in lines) or None


# --- from values to words ----------------------------------------------------------------------------------------


def _summary(done: Summary) -> str:
    left_out = f", {done.rejected} left out (see {done.quarantine})" if done.rejected else ""
    return (
        f"generation {done.generation}, {done.documents} documents ({done.added} encoded, {done.reused} reused"
        f"{left_out}), {done.seconds:.1f} s"
    )


def _results(found: dict[str, Any]) -> Iterator[str]:
    measures = list(next(iter(found["results"].values())))
    rows = []
    for name, means in found["results"].items():
        bounds = found["intervals"][name]
        cells = [f"{means[m]:.4f} [{bounds[m][0]:.4f}, {bounds[m][1]:.4f}]" for m in measures]
        rows.append([name, *cells, f"{found['unjudged'][name]:.2f}"])
    yield f"{found['collection']}, split {found['split']}: {found['queries']} queries"
    yield from terminal.table(["", *measures, "unjudged@10"], rows)


def _write(out: Path | None, lines: Iterable[str]) -> None:
    if out is None:
        for line in lines:
            print(line)
        return
    fresh = out.with_name(out.name + ".new")
    try:
        file = fresh.open("w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out: cannot write '{out}' ({error.strerror}); name a file of another folder") from error
    with file:
        file.writelines(line + "\n" for line in lines)
    fresh.replace(out)


# --- the end of every command ------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Runs one command and exits: 0 done, 2 the caller's fault, 1 ours, 130 stopped by Ctrl-C."""
    _open_streams()
    _quiet()
    words = _home_first(sys.argv[1:] if arguments is None else arguments)
    try:
        status = app(args=words, prog_name="lightbox", standalone_mode=False) or 0
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit):  # typer exits where it meets a closed pipe, and nowhere else
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `lightbox search … | head` is no error
        status = 0
    except Exception as error:  # the one place where errors end
        if os.environ.get("LIGHTBOX_DEBUG") == "1":
            traceback.print_exc()
        status, message = _verdict(error)
        say(f"lightbox: {' '.join(message.split())}")
    if status == 130:
        say("lightbox: stopped; the same command again goes on from here")
    sys.exit(status)


def _open_streams() -> None:
    """What the caller closed (`>&-`) is None; left so, the next file opened would get its number."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (as long as the process)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _quiet() -> None:
    """Libraries draw bars and warn on standard error; ours is for people."""
    if os.environ.get("LIGHTBOX_DEBUG") != "1":
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        warnings.showwarning = lambda *_, **__: None  # a filter would not do: spaCy sets its own


def _home_first(arguments: list[str]) -> list[str]:
    """`--home DIR` may stand anywhere; typer wants the options of all commands before the command."""
    for i, word in enumerate(arguments):
        if word == "--":
            break
        if word == "--home":
            return [*arguments[i : i + 2], *arguments[:i], *arguments[i + 2 :]]
        if word.startswith("--home="):
            return [word, *arguments[:i], *arguments[i + 1 :]]
    return arguments


def _verdict(error: Exception) -> tuple[int, str]:
    if isinstance(error, InputError):
        return 2, str(error)
    if isinstance(error, RetrievalError):
        return 1, str(error)
    if isinstance(error, typer.TyperException):
        return 2, f"{error.format_message().rstrip('.')}; {_where_help_is(error)}"
    if isinstance(error, PermissionError):
        return 2, f"no permission for '{error.filename}'; choose another place or change its rights"
    if isinstance(error, OSError):
        return 1, f"{error.strerror or error} {error.filename or ''}"
    return 1, f"internal error: {type(error).__name__}: {error}; LIGHTBOX_DEBUG=1 shows where"


def _where_help_is(error: Exception) -> str:
    """The help of the command that was meant, where it is known."""
    context: typer.Context | None = getattr(error, "ctx", None)
    return f"'{context.command_path if context else 'lightbox'} --help' lists what there is"


if __name__ == "__main__":
    main()
