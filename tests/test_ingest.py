"""Documents made ready: what is decoded, linked, encoded, and what is refused."""

from __future__ import annotations

from retrieval.errors import NotAnImage
from retrieval.ingest import Ingest
from retrieval.types import Document, ImageSource, Picture
from tests.fakes import HashingEncoder, WordLinker


def read(source: ImageSource) -> Picture:
    if source == b"broken":
        raise NotAnImage("not a picture")
    return Picture("digest", b"png", "pixels")


def ingest() -> Ingest:
    return Ingest([HashingEncoder()], WordLinker(["effusion"]), read)


def test_each_side_that_a_document_has_gets_a_vector() -> None:
    prepared = ingest()(
        [Document(id="t", text="left"), Document(id="i", image=b"x"), Document(id="b", title="T", image=b"y")]
    )
    assert prepared.encodings["text", "text"].rows.tolist() == [0, 2]
    assert prepared.encodings["text", "image"].rows.tolist() == [1, 2]
    assert prepared.encodings["text", "text"].matrix.shape == (2, 16)


def test_a_document_without_anything_is_kept_without_vectors() -> None:
    prepared = ingest()([Document(id="e", text="  ")])
    assert [d.id for d in prepared.documents] == ["e"]
    assert prepared.encodings == {}


def test_an_unreadable_picture_is_named_and_the_rest_goes_on() -> None:
    prepared = ingest()([Document(id="bad", image=b"broken"), Document(id="good", text="effusion")])
    assert [(r.id, r.reason) for r in prepared.rejected] == [("bad", "not a picture")]
    assert [d.id for d in prepared.documents] == ["good"]
    assert prepared.encodings["text", "text"].rows.tolist() == [0]


def test_findings_are_linked_in_the_text() -> None:
    (document,) = ingest()([Document(id="d", title="effusion", text="no effusion")]).documents
    assert [(f.concept, f.span) for f in document.findings] == [("effusion", (3, 11))]


def test_the_digest_changes_with_an_encoder_and_with_the_linker() -> None:
    plain = Ingest([HashingEncoder()], None, read).digest
    assert len({plain, ingest().digest, Ingest([HashingEncoder(name="other")], None, read).digest}) == 3
