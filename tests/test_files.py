from __future__ import annotations

import csv
import io
import json
import os
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ir_measures
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval import rows
from retrieval.errors import InputError, NotFound
from retrieval.evaluate import evaluate
from retrieval.files import Source, kind_of, read_qrels, read_run, read_source, write_run
from retrieval.rows import typed
from retrieval.types import Document, Hit, Ranking, Rejected, Run

PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 200
JPEG = b"\xff\xd8\xff\xe0" + b"\0" * 200
WEBP = b"RIFF\x10\0\0\0WEBPVP8 " + b"\0" * 200
DICOM = b"\0" * 128 + b"DICM" + b"\0" * 200
BARE_DICOM = b"\x08\x00\x05\x00CS\x0a\x00ISO_IR 100" + b"\0" * 200


def beir(folder: Path, *lines: bytes | str | dict[str, Any]) -> Source:
    """A source whose corpus has these lines."""
    with (folder / "corpus.jsonl").open("wb") as file:
        for line in lines:
            text = json.dumps(line) if isinstance(line, dict) else line
            file.write((text.encode() if isinstance(text, str) else text) + b"\n")
    return read_source(folder)


def sorted_out(source: Source) -> tuple[list[Document], list[Rejected]]:
    items = list(source.documents())
    return [i for i in items if isinstance(i, Document)], [i for i in items if isinstance(i, Rejected)]


def rejections(source: Source) -> list[tuple[int | None, str | None, str]]:
    return [(r.line, r.id, r.reason) for r in sorted_out(source)[1]]


# --- BEIR ---


def test_a_beir_document_comes_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/x.png").write_bytes(PNG)
    source = beir(
        tmp_path,
        {
            "_id": "a",
            "title": "T",
            "text": "x",
            "image": "images/x.png",
            "metadata": {"year": 2010, "tags": ["p", None]},
        },
        {"_id": "b"},
        {"_id": "c", "title": None, "text": None, "image": None, "metadata": None, "authors": "left out"},
    )
    assert sorted_out(source) == (
        [
            Document(
                id="a", title="T", text="x", image=tmp_path / "images/x.png", meta={"year": 2010, "tags": ["p", None]}
            ),
            Document(id="b"),
            Document(id="c"),
        ],
        [],
    )
    assert source.name == tmp_path.name


@pytest.mark.parametrize(
    ("line", "id", "reason"),
    [
        (b'{"_id": "a", "text": "secret"', None, "invalid JSON at column"),
        (b'{"_id": "a", "text": "sec\\qret"}', None, "invalid JSON at column"),
        (b'{"_id": "a", "text": "secret\xff"}', None, "not UTF-8 (byte 29 of the line)"),
        (b'["secret"]', None, "expected a JSON object"),
        (b'"secret"', None, "expected a JSON object"),
        (b'{"_id": "a", "metadata": {"secret": NaN}}', None, "NaN is no JSON number"),
        (b'{"_id": "a", "metadata": {"secret": -Infinity}}', None, "-Infinity is no JSON number"),
        (b'{"_id": "a", "metadata": {"secret": 1e999}}', None, "beyond the range"),
        (b'{"_id": "a", "metadata": {"secret": %s}}' % (b"9" * 5000), None, "too many digits"),
        (b'{"_id": "a", "metadata": {"secret": %d}}' % 2**63, "a", "beyond 64 bits"),
        (b'{"_id": "a", "metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, "nested too deeply"),
        (b'{"_id": "a", "metadata": {"secret": ' + b"[" * 50 + b"]" * 50 + b"}}", "a", "deeper than 20"),
        (b'{"_id": "a", "text": "secret \\ud800"}', None, "surrogate"),
        (b'{"text": "secret"}', None, "no _id"),
        (b'{"_id": "", "text": "secret"}', None, "no _id, or an empty one"),
        (b'{"_id": "  ", "text": "secret"}', None, "no _id, or an empty one"),
        (b'{"_id": null, "text": "secret"}', None, "no _id"),
        (b'{"_id": 5, "text": "secret"}', None, "_id: expected a text, got a number"),
        (b'{"_id": ["secret"]}', None, "_id: expected a text, got a list"),
        (b'{"_id": "%s"}' % (b"secret" * 100), None, "_id: longer than 512 bytes"),
        (b'{"_id": "a\\tsecret"}', None, "_id: holds a control character"),
        (b'{"_id": "a", "text": ["secret"]}', "a", "text: expected a text, got a list"),
        (b'{"_id": "a", "title": true}', "a", "title: expected a text, got true or false"),
        (b'{"_id": "a", "metadata": ["secret"]}', "a", "metadata: expected an object, got a list"),
        (b'{"_id": "a", "image": {"base64": "secret"}}', "a", "image: expected a path below the source"),
        (b'{"_id": "a", "image": "images/secret.png"}', "a", "image: no such file"),
        (b'{"_id": "a", "image": "/etc/secret"}', "a", "without '..'"),
        (b'{"_id": "a", "image": "../secret.png"}', "a", "without '..'"),
        (b'{"_id": "a", "image": "images/../../secret.png"}', "a", "without '..'"),
        (b'{"_id": "a", "image": "images\\\\..\\\\secret.png"}', "a", "without '..'"),
        (b'{"_id": "a", "image": "C:\\\\secret.png"}', "a", "without '..'"),
        (b'{"_id": "a", "image": "secret\\u0000.png"}', "a", "without '..'"),
        (b'{"_id": "a", "image": "%s.png"}' % (b"secret" * 1000), "a", "image: cannot be read"),
        (b'{"_id": "a", "image": "."}', "a", "image: no such file"),
    ],
)  # fmt: skip
def test_a_bad_line_is_set_aside_with_its_reason_and_without_its_content(
    tmp_path: Path, line: bytes, id: str | None, reason: str
) -> None:
    documents, rejected = sorted_out(beir(tmp_path, {"_id": "first"}, "", line, {"_id": "last"}))
    assert [document.id for document in documents] == ["first", "last"]
    assert [(one.line, one.id) for one in rejected] == [(3, id)]
    assert reason in rejected[0].reason
    assert "secret" not in rejected[0].reason


def test_the_first_of_two_equal_ids_wins(tmp_path: Path) -> None:
    source = beir(tmp_path, {"_id": "a", "text": "first"}, {"_id": "a", "text": "second"}, {"_id": "a", "text": 3})
    documents, rejected = sorted_out(source)
    assert [document.text for document in documents] == ["first"]
    assert [(one.line, one.id) for one in rejected] == [(2, "a"), (3, "a")]
    assert "duplicate id" in rejected[0].reason


def test_a_rejected_document_does_not_hold_its_id(tmp_path: Path) -> None:
    source = beir(tmp_path, {"_id": "a", "text": 3}, {"_id": "a", "text": "second"})
    assert [document.text for document in sorted_out(source)[0]] == ["second"]


def test_windows_line_ends_and_a_byte_order_mark_are_no_content(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(b'\xef\xbb\xbf{"_id": "a"}\r\n{"_id": "b"}\r\n')
    assert [document.id for document in sorted_out(read_source(tmp_path))[0]] == ["a", "b"]


def test_a_line_over_the_limit_is_set_aside_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_LINE", 64)
    exact = b'{"_id": "b", "text": "' + b"x" * 39 + b'"}'
    assert len(exact) == 63
    source = beir(tmp_path, b'{"_id": "a", "text": "' + b"x" * 300 + b'"}', exact, {"_id": "c"})
    documents, rejected = sorted_out(source)
    assert [document.id for document in documents] == ["b", "c"]
    assert [(one.line, one.id) for one in rejected] == [(1, None)]


def test_pictures_are_told_by_content(tmp_path: Path) -> None:
    kinds = {"a.jpg": JPEG, "b": PNG, "c.png": WEBP, "d.dcm": DICOM, "e": DICOM, "f": BARE_DICOM}
    others = {"g.jpg": b"<html>secret</html>", "h.png": b"", "i.dcm": b"\0" * 300, "j.gif": b"GIF89a" + b"\0" * 200}
    for name, content in (kinds | others).items():
        (tmp_path / name).write_bytes(content)
    documents, rejected = sorted_out(beir(tmp_path, *({"_id": name, "image": name} for name in kinds | others)))
    assert [document.id for document in documents] == list(kinds)
    assert [(one.id, one.reason) for one in rejected] == [
        ("g.jpg", "image: not a JPEG, PNG, WebP or DICOM file"),
        ("h.png", "image: empty file"),
        ("i.dcm", "image: not a JPEG, PNG, WebP or DICOM file"),
        ("j.gif", "image: not a JPEG, PNG, WebP or DICOM file"),
    ]


def test_links_of_the_operator_are_followed_and_pipes_are_not_opened(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x.png").write_bytes(PNG)
    home = tmp_path / "source"
    home.mkdir()
    (home / "images").symlink_to(elsewhere)
    os.mkfifo(home / "pipe.png")
    documents, rejected = sorted_out(
        beir(home, {"_id": "a", "image": "images/x.png"}, {"_id": "b", "image": "pipe.png"})
    )
    assert [document.image for document in documents] == [home / "images/x.png"]
    assert rejected == [Rejected(2, "b", "image: no such file")]


def test_the_picture_stays_found_when_the_working_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.png").write_bytes(PNG)
    beir(tmp_path, {"_id": "a", "image": "x.png"})
    monkeypatch.chdir(tmp_path.parent)
    (document,) = sorted_out(read_source(tmp_path.name))[0]
    monkeypatch.chdir("/")
    assert isinstance(document.image, Path)
    assert document.image.is_file()


def test_the_corpus_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    line = json.dumps({"_id": "%d", "text": "x" * 10_000})
    source = beir(tmp_path, *(line.replace("%d", str(n)) for n in range(2_000)))
    tracemalloc.start()
    assert sum(1 for _ in source.documents()) == 2_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000  # the file is 20 MB


def test_an_empty_corpus_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no document in it"):
        list(beir(tmp_path, "", "  ").documents())


def test_a_corpus_of_bad_lines_only_is_no_error_of_the_source(tmp_path: Path) -> None:
    assert len(list(beir(tmp_path, "x", "y").documents())) == 2


def test_what_is_no_source_is_refused_without_its_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"^nothing: no such file or folder"):
        read_source(tmp_path / "nothing")
    (tmp_path / "x.xlsx").write_bytes(b"")
    with pytest.raises(InputError, match=r"expected a folder, or a file named \.jsonl"):
        read_source(tmp_path / "x.xlsx")
    (tmp_path / "queries.jsonl").write_text("{}")
    with pytest.raises(NotFound, match=r"^corpus\.jsonl: no such file"):
        list(read_source(tmp_path).documents())
    with pytest.raises(InputError, match="a column mapping belongs to"):
        read_source(tmp_path, {"_id": "x"})


def test_what_the_system_will_not_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").mkdir()
    with pytest.raises(InputError, match=r"^corpus\.jsonl: cannot be read \(Is a directory\)$"):
        list(read_source(tmp_path).documents())


@given(st.lists(st.one_of(st.binary(max_size=40), st.text(max_size=40).map(str.encode))))
def test_no_bytes_whatever_stop_the_reading(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("noise")
    source = beir(folder, *lines, {"_id": "the good one"})
    assert [document.id for document in sorted_out(source)[0]][-1] == "the good one"


# --- pictures ---


def pictures(folder: Path, files: dict[str, bytes]) -> Source:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return read_source(folder)


def test_a_folder_of_pictures_has_captions_beside_them(tmp_path: Path) -> None:
    source = pictures(
        tmp_path,
        {
            "b.jpg": JPEG,
            "b.txt": "\ufeffleft effusion\n".encode(),
            "a.png": PNG,
            "sub/IM0001": DICOM,
            "sub/IM0001.txt": b"a film",
            "sub/1.2.840.7": DICOM,
            "sub/1.2.840.txt": b"of another",
            "c.webp": WEBP,
            "c.webp.txt": b"whole name",
            "notes.txt": b"no picture",
            ".hidden.png": PNG,
            ".git/x.png": PNG,
        },
    )
    documents, rejected = sorted_out(source)
    assert [(document.id, document.text, dict(document.meta)) for document in documents] == [
        ("a.png", "", {}),
        ("b.jpg", "left effusion", {}),
        ("c.webp", "whole name", {}),
        ("sub/1.2.840.7", "", {"folder": "sub"}),
        ("sub/IM0001", "a film", {"folder": "sub"}),
    ]
    assert documents[-1].image == tmp_path / "sub/IM0001"
    assert rejected == []


def test_what_claims_to_be_a_picture_and_is_none_is_set_aside(tmp_path: Path) -> None:
    source = pictures(
        tmp_path, {"a.jpg": b"<html>", "b.PNG": b"", "c.dcm": b"text", "d.png": PNG, "d.txt": b"\xff", "e.doc": b"x"}
    )
    assert sorted_out(source) == (
        [],
        [
            Rejected(None, "a.jpg", "image: not a JPEG, PNG, WebP or DICOM file"),
            Rejected(None, "b.PNG", "image: empty file"),
            Rejected(None, "c.dcm", "image: not a JPEG, PNG, WebP or DICOM file"),
            Rejected(None, "d.png", "caption: not UTF-8"),
        ],
    )


def test_a_picture_without_an_extension_and_with_a_bad_caption_is_set_aside_too(tmp_path: Path) -> None:
    source = pictures(tmp_path, {"IM1": DICOM, "IM1.txt": b"\xff", "IM2": b""})
    assert sorted_out(source) == ([], [Rejected(None, "IM1", "caption: not UTF-8")])


def test_a_file_name_that_is_not_utf8_is_set_aside(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).write_bytes(PNG)
    ((line, id, reason),) = rejections(read_source(tmp_path))
    assert (line, id) == (None, None)
    assert "not UTF-8" in reason


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    source = pictures(tmp_path, {"a/x.png": PNG})
    (tmp_path / "a/again").symlink_to(tmp_path)
    assert [document.id for document in sorted_out(source)[0]] == ["a/x.png"]


def test_a_folder_without_pictures_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no document in it"):
        list(pictures(tmp_path, {"x.txt": b"x"}).documents())


# --- CSV and JSONL ---


def table(folder: Path, text: str | bytes, mapping: dict[str, Any] | None = None, name: str = "t.csv") -> Source:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return read_source(folder / name, mapping)


def test_a_csv_is_mapped_by_column(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(PNG)
    text = 'uid,findings,impression,file,year,sex\n7,"Heart, large.\nNo effusion.",Bad,x.png,2010,f\n08,,Fine,,,\n'
    mapping = {
        "_id": "uid",
        "text": ["findings", "impression"],
        "image": "file",
        "metadata": {"study.year": "year", "sex": "sex"},
    }
    assert sorted_out(table(tmp_path, text, mapping)) == (
        [
            Document(
                id="7",
                text="Heart, large.\nNo effusion.\nBad",
                image=tmp_path / "x.png",
                meta={"study.year": 2010, "sex": "f"},
            ),
            Document(id="08", text="Fine", meta={"study.year": None, "sex": None}),
        ],
        [],
    )


def test_columns_with_the_known_names_need_no_mapping(tmp_path: Path) -> None:
    source = table(tmp_path, "id;title;text;score;flag\n1;T;x;0.5;TRUE\n")
    assert sorted_out(source)[0] == [Document(id="1", title="T", text="x", meta={"score": 0.5, "flag": True})]


def test_a_mapping_may_stand_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "t.mapping.json").write_text('{"_id": "name", "metadata": ["n"]}')
    assert sorted_out(table(tmp_path, "name\tn\na\t1\n", name="t.tsv"))[0] == [Document(id="a", meta={"n": 1})]
    for bad in ("[]", "{", '{"_id": "name", "txt": "n"}', '{"_id": "other"}', '{"text": "n"}'):
        (tmp_path / "t.mapping.json").write_text(bad)
        with pytest.raises(InputError):
            read_source(tmp_path / "t.tsv")


def test_bad_records_are_set_aside_with_the_line_they_begin_on(tmp_path: Path) -> None:
    text = b'_id,text\na,"two\nlines"\nb,secret,more\nc,\xffsecret\n,secret\n\nd,ok\na,secret\n'
    text += b'e,"sec"ret\nf,ok\ng,"secret\n'
    documents, rejected = sorted_out(table(tmp_path, text))
    assert [document.id for document in documents] == ["a", "d", "f"]
    assert [(one.line, one.id) for one in rejected] == [
        (4, None), (5, None), (6, None), (9, "a"), (10, None), (12, None)
    ]  # fmt: skip
    assert not any("secret" in one.reason for one in rejected)
    assert [one.reason for one in rejected][:2] == ["3 fields, expected 2", "not UTF-8"]


def test_mappings_that_fit_no_column_are_refused_at_once(tmp_path: Path) -> None:
    text = "uid,report\n1,x\n"
    with pytest.raises(InputError, match="map one of: uid, report"):
        table(tmp_path, text)
    with pytest.raises(InputError, match="no column body; there are: uid, report"):
        table(tmp_path, text, {"_id": "uid", "text": "body"})
    bad: list[dict[str, Any]] = [
        {"_id": 3}, {}, {"_id": "uid", "text": []}, {"_id": "uid", "body": "report"}, {"_id": "uid", "metadata": 1}
    ]  # fmt: skip
    for mapping in bad:
        with pytest.raises(InputError) as caught:
            table(tmp_path, text, mapping)
        assert (caught.value.field or "").startswith("mapping")
    for header in ("", "a,a\n", "a,,b\n", b"\xff\n"):
        with pytest.raises(InputError):
            table(tmp_path, header, {"_id": "a"})


def test_long_cells_are_read(tmp_path: Path) -> None:
    documents, _ = sorted_out(table(tmp_path, f"_id,text\na,{'x' * 300_000}\n"))
    assert len(documents[0].text) == 300_000


def test_a_jsonl_file_is_mapped_too_and_numbers_serve_as_ids(tmp_path: Path) -> None:
    text = '{"uid": 5, "findings": "x", "mesh": ["a", "b"]}\n{"uid": true}\n{"findings": "y"}\n'
    mapping = {"_id": "uid", "text": "findings", "metadata": "mesh"}
    documents, rejected = sorted_out(table(tmp_path, text, mapping, "t.jsonl"))
    assert documents == [Document(id="5", text="x", meta={"mesh": ["a", "b"]})]
    assert [one.line for one in rejected] == [2, 3]


def test_a_jsonl_file_without_a_mapping_holds_beir_documents(tmp_path: Path) -> None:
    source = table(tmp_path, '{"_id": "a", "metadata": {"n": 1}}\n', name="more.jsonl")
    assert sorted_out(source)[0] == [Document(id="a", meta={"n": 1})]
    assert source.splits() == []
    with pytest.raises(NotFound):
        source.queries()
    with pytest.raises(NotFound):
        source.qrels("test")


@given(st.one_of(st.integers(-(2**62), 2**62), st.floats(allow_nan=False, allow_infinity=False), st.booleans()))
def test_typed_reads_back_what_json_writes(value: Any) -> None:
    read = typed(json.dumps(value))
    assert read == value or read == json.dumps(value)  # beyond its pattern a number stays a text
    assert isinstance(typed("1e-7"), float)


@given(st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=2, max_size=2)))
def test_any_table_that_csv_writes_is_read(tmp_path_factory: pytest.TempPathFactory, cells: list[list[str]]) -> None:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, quoting=csv.QUOTE_ALL).writerows(
        [["_id", "text"], *([f"{n}", b] for n, (_, b) in enumerate(cells))]
    )
    folder = tmp_path_factory.mktemp("table")
    source = table(folder, buffer.getvalue())
    if cells:
        documents, rejected = sorted_out(source)
        assert rejected == []
        assert [document.text.split() for document in documents] == [text.split() for _, text in cells]


# --- queries ---


def queries(folder: Path, *lines: str) -> Source:
    (folder / "queries.jsonl").write_text("\n".join(lines))
    return read_source(folder)


def test_queries_have_parts_of_a_kind(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(PNG)
    source = queries(
        tmp_path,
        '{"_id": "1", "text": "pleural effusion"}',
        '{"_id": "2", "text": "Heart normal. No effusion."}',
        '{"_id": "3", "text": "effusion", "kind": "report"}',
        '{"_id": "4", "text": "", "image": "x.png"}',
        '{"_id": "5", "text": "like this", "image": "x.png", "metadata": {"any": 1}}',
    )
    found = {q.id: [(part.text, part.kind, part.image) for part in q.parts] for q in source.queries()}
    assert found == {
        "1": [("pleural effusion", "text", None)],
        "2": [("Heart normal. No effusion.", "report", None)],
        "3": [("effusion", "report", None)],
        "4": [("", "text", tmp_path / "x.png")],
        "5": [("like this", "text", None), ("", "text", tmp_path / "x.png")],
    }


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("small left effusion", "text"),
        ("small left effusion.", "text"),
        ("Effusion vs. atelectasis in E. coli sepsis, Fig. 3, Smith et al. 2010", "text"),
        ("0.5 mg of i.v. drug", "text"),
        ("what similarity laws must be obeyed ?", "text"),
        ("the lens. a method of interest is polarography", "report"),
        ("flows . what about supersonic ones ?", "report"),
        ("Is it (really)? Yes", "report"),
        ("FINDINGS\n\nclear lungs", "report"),
        ("one\nline wrapped", "text"),
        ("", "text"),
    ],
)
def test_more_than_one_sentence_makes_a_report(text: str, kind: str) -> None:
    assert kind_of(text) == kind


@pytest.mark.parametrize(
    "line",
    [
        '{"_id": "1"}', '{"_id": "1", "text": "  "}', '{"text": "x"}', '{"_id": "0", "text": "again"}', "{", "[]",
        '{"_id": "1", "text": "x", "kind": "poem"}', '{"_id": "1", "image": "none.png"}', '{"_id": "1", "text": 5}',
    ],
)  # fmt: skip
def test_a_bad_query_is_an_error_with_its_line(tmp_path: Path, line: str) -> None:
    source = queries(tmp_path, '{"_id": "0", "text": "good"}', line)
    with pytest.raises(InputError, match=r"^queries\.jsonl line 2: "):
        source.queries()


def test_missing_or_empty_queries_are_told(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"queries\.jsonl: no such file"):
        beir(tmp_path, {"_id": "a"}).queries()
    with pytest.raises(InputError, match="no query"):
        queries(tmp_path, "").queries()


# --- judgments and runs ---


def test_judgments_of_both_layouts_are_read(tmp_path: Path) -> None:
    beir(tmp_path, {"_id": "a"})
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq 1\tmy cat.jpg\t2\nq 1\tb\t0\n\nq2\ta\t1\n")
    (tmp_path / "qrels/trec.txt").write_text("q1 0 a 1\nq1 Q0 b -1\nq2\t0\tc\t3\n")
    (tmp_path / "qrels/bare.tsv").write_text("q1\ta\t1.0\r\n")
    source = read_source(tmp_path)
    assert source.splits() == ["bare", "test", "trec"]
    assert source.qrels("test") == {"q 1": {"my cat.jpg": 2, "b": 0}, "q2": {"a": 1}}
    assert source.qrels("trec") == {"q1": {"a": 1, "b": -1}, "q2": {"c": 3}}
    assert source.qrels("bare") == {"q1": {"a": 1}}
    with pytest.raises(NotFound, match=r"no judgments named '\.\./test'; there are: bare, test, trec"):
        source.qrels("../test")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("q a 1.5\n", "line 1: expected a whole number"),
        ("q a 1\nq b x\n", "line 2: expected a whole number"),
        ("q a 1\nq b 1.5\n", "line 2: expected a whole number"),
        ("q a 1\nq b 99999999999\n", "line 2: expected a whole number"),
        ("q a 1\nq b\n", "line 2: 2 fields"),
        ("q a 1\nq a 2\n", "line 2: the document was judged before"),
    ],
)
def test_bad_judgments_are_errors_with_their_line(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "x.tsv").write_text(text)
    with pytest.raises(InputError, match=reason):
        read_qrels(tmp_path / "x.tsv")


def test_the_same_judgment_twice_is_one(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("q a 1\nq a 1\n")
    assert read_qrels(tmp_path / "x.tsv") == {"q": {"a": 1}}


def order(run: Run) -> dict[str, list[str]]:
    return {query: [hit.id for hit in ranking] for query, ranking in run.items()}


IDS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1).filter(str.strip)
RANKINGS = st.lists(st.tuples(IDS, st.floats(-1e6, 1e6)), min_size=1, unique_by=lambda hit: hit[0])


@given(st.dictionaries(IDS, RANKINGS))
def test_a_run_comes_back_in_the_order_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, hits: dict[str, list[tuple[str, float]]]
) -> None:
    path = tmp_path_factory.mktemp("runs") / "x.run"
    run: Run = {query: Ranking(Hit(id, score) for id, score in ranking) for query, ranking in hits.items()}
    write_run(path, run)
    assert order(read_run(path)) == order(run)


def test_equal_scores_are_written_strictly_falling_and_otherwise_kept(tmp_path: Path) -> None:
    write_run(tmp_path / "x.run", {"q": Ranking([Hit("a", 0.5), Hit("b", 0.5), Hit("c", 0.25)])}, tag="me")
    lines = [line.split() for line in (tmp_path / "x.run").read_text().splitlines()]
    assert [line[:4] for line in lines] == [["q", "Q0", "a", "1"], ["q", "Q0", "b", "2"], ["q", "Q0", "c", "3"]]
    assert [line[5] for line in lines] == ["me"] * 3
    scores = [float(line[4]) for line in lines]
    assert scores[0] == 0.5 > scores[1] > 0.4999999
    assert scores[2] == 0.25


def test_other_tools_measure_a_written_run_as_we_do(tmp_path: Path) -> None:
    run = {"q": Ranking(Hit(id, score) for id, score in [("a", 0.9), ("b", 0.9), ("c", 0.9), ("d", 0.5), ("e", 0.5)])}
    qrels = {"q": {"a": 1, "c": 2, "e": 3}}
    write_run(tmp_path / "x.run", run)
    read: Any = ir_measures.read_trec_run
    wanted = [ir_measures.nDCG @ 10, ir_measures.RR]
    theirs = ir_measures.calc_aggregate(wanted, qrels, read(str(tmp_path / "x.run")))
    ours = evaluate(run, qrels, ["nDCG@10", "RR"]).means
    assert {str(measure): value for measure, value in theirs.items()} == pytest.approx(ours)


def test_a_foreign_run_is_ordered_by_score_then_by_id(tmp_path: Path) -> None:
    (tmp_path / "x.run").write_text("q Q0 c 1 1.0 t\nq Q0 b 1 1.0 t\nq Q0 a 1 2e0 t\n")
    assert order(read_run(tmp_path / "x.run")) == {"q": ["a", "b", "c"]}


@pytest.mark.parametrize("line", ["q Q0 b 1 nan t", "q Q0 b 1 inf t", "q Q0 b 1 x t", "q Q0 b 1 t", "q Q0 a 2 1 t"])
def test_a_bad_run_is_an_error_with_its_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.run").write_text(f"q Q0 a 1 2.0 t\n{line}\n")
    with pytest.raises(InputError, match=r"x\.run line 2: "):
        read_run(tmp_path / "x.run")


def test_a_run_with_a_score_that_is_no_number_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a finite number"):
        write_run(tmp_path / "x.run", {"q": Ranking([Hit("a", float("nan"))])})


# --- real data ---


@pytest.mark.parametrize(
    ("name", "documents", "queries", "judged"),
    [("scifact", 5183, 1109, 300), ("cranfield", 1400, 225, 225), ("cacm", 3204, 64, 52), ("adi", 82, 35, 35)],
)
def test_the_classic_collections_are_read_whole(
    data: Path, name: str, documents: int, queries: int, judged: int
) -> None:
    source = read_source(data / name)
    found, rejected = sorted_out(source)
    assert (len(found), len(rejected)) == (documents, 0)
    assert len(source.queries()) == queries
    assert len(source.qrels("test")) == judged


def test_claims_of_scifact_are_texts(data: Path) -> None:
    kinds: Iterable[str] = (query.parts[0].kind for query in read_source(data / "scifact").queries())
    assert sum(kind == "report" for kind in kinds) <= 5


def test_a_folder_of_photos_is_a_source(data: Path) -> None:
    documents, rejected = sorted_out(read_source(data / "grocery_store"))
    assert (len(documents), rejected) == (1349, [])
