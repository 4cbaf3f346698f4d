"""SQLite: documents, metadata, findings and digests; the durable truth of one generation.

Every document has a *row*, a number that is given once and never again, so that derived arrays can be
indexed by it. A document is never changed in place: its successor gets a new row and the old row gets
an entry in `deaths`, which says with which publish it disappears. So a published state is three
numbers: all rows below `rows`, without those that died up to `sequence`.

A write is acknowledged when its transaction is on disk (WAL, ``synchronous=FULL``). Every row carries a
digest that is checked when it is read. The sidecar file ``writes`` counts acknowledged transactions,
so that a store which lost some (a WAL that was deleted or cut) is noticed.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from indexers.records import Record, Rows, Shard, State, digest_of
from indexers.shards import Damaged, disk, replace_file
from retrieval.errors import BackendError
from retrieval.types import Matrix, Side

BUSY_S = 60.0  # a checkpoint of another process may hold the file for a moment
REPLACED_KEPT = 8  # publishes for which the old text of a replaced document stays readable
_SCHEMA = """
CREATE TABLE facts(key TEXT PRIMARY KEY, value TEXT NOT NULL, digest BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE documents(row INTEGER PRIMARY KEY, id TEXT NOT NULL, title TEXT NOT NULL, text TEXT NOT NULL,
    meta TEXT NOT NULL, findings TEXT NOT NULL, picture TEXT, path TEXT, blob TEXT, source TEXT, digest BLOB NOT NULL);
CREATE TABLE names(id TEXT PRIMARY KEY, row INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE deaths(row INTEGER PRIMARY KEY, sequence INTEGER NOT NULL, replaced INTEGER NOT NULL,
    digest BLOB NOT NULL);
CREATE INDEX deaths_by_sequence ON deaths(sequence);
CREATE TABLE thumbnails(row INTEGER PRIMARY KEY, png BLOB NOT NULL, digest BLOB NOT NULL);
CREATE TABLE shards(number INTEGER PRIMARY KEY AUTOINCREMENT, space TEXT NOT NULL, side TEXT NOT NULL,
    name TEXT NOT NULL, rows BLOB NOT NULL, digest BLOB NOT NULL);
CREATE TABLE tail(row INTEGER NOT NULL, space TEXT NOT NULL, side TEXT NOT NULL, vector BLOB NOT NULL,
    digest BLOB NOT NULL, PRIMARY KEY (row, space, side)) WITHOUT ROWID;
"""
_COLUMNS = "row, id, title, text, meta, findings, picture, path, blob, source, digest"


class Store:
    """One generation's database. Reads are thread-safe; writes are for the holder of the writer lock."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise Damaged(f"{path.name} is missing; roll back, or index the source again")
        self.path = path
        self._idle: list[sqlite3.Connection] = []
        self._closed = False
        self._guard = threading.Lock()
        with _sqlite("opening the store"):
            self._watch = _connect(path)
        self._check_writes()

    @classmethod
    @contextmanager
    def filling(cls, path: Path, about: Mapping[str, Any]) -> Iterator[Writer]:
        """Makes a store in one go, without a log: for a folder that nobody uses unless this ends well."""
        with _sqlite("writing the store"):
            connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            try:
                for pragma in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -65536"):
                    connection.execute(f"PRAGMA {pragma}")
                connection.executescript(_SCHEMA)
                connection.execute("BEGIN")
                _put(connection, "about", about)
                _put(connection, "state", State()._asdict())
                writer = Writer(connection)
                yield writer
                writer.finish()
                connection.execute("COMMIT")
                connection.execute("PRAGMA journal_mode = WAL")
            finally:
                connection.close()
        with disk("writing the store"):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            replace_file(path.with_name("writes"), _counted(writer.now.writes))

    def close(self) -> None:
        """Lets go of the file as soon as nobody reads it any more."""
        with self._guard:
            self._closed = True
            for connection in self._idle:
                connection.close()
            self._idle.clear()
            self._watch.close()

    # --- transactions ----------------------------------------------------------------------------

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """A connection of one's own: as many exist as are used at once."""
        with self._guard:
            connection = self._idle.pop() if self._idle else None
        connection = connection or _connect(self.path)
        try:
            yield connection
        finally:
            with self._guard:
                if self._closed:
                    connection.close()
                else:
                    self._idle.append(connection)

    @contextmanager
    def reading(self) -> Iterator[Reader]:
        """One consistent state, whatever is written meanwhile."""
        with _sqlite("reading the store"), self._connected() as connection:
            connection.execute("BEGIN")
            try:
                yield Reader(connection)
            finally:
                connection.execute("ROLLBACK")

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """All or nothing; on disk at the end of the block."""
        with _sqlite("writing to the store"), self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                writer = Writer(connection)
                yield writer
                writer.finish()
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        self._count_write(writer.now.writes)

    def checkpoint(self) -> None:
        """Moves the log into the database; a reader in the way only delays it."""
        with _sqlite("writing to the store"), self._connected() as connection:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def version(self) -> int:
        """Changes whenever something is committed, here or in another process."""
        with _sqlite("reading the store"), self._guard:
            return int(self._watch.execute("PRAGMA data_version").fetchone()[0])

    # --- the count of acknowledged writes --------------------------------------------------------

    @property
    def _counter(self) -> Path:
        return self.path.with_name("writes")

    def _count_write(self, writes: int) -> None:
        with disk("counting a write"):
            handle = os.open(self._counter, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                os.pwrite(handle, _counted(writes), 0)
                os.fdatasync(handle)
            finally:
                os.close(handle)

    def _check_writes(self) -> None:
        try:
            content = self._counter.read_bytes()
        except OSError:
            return
        number = int(content[:16], 16) if len(content) == 33 and content[:16].isalnum() else 0
        if content != _counted(number):
            return
        with self.reading() as reader:
            if reader.state().writes < number:
                raise Damaged(
                    f"{self.path.name} lost writes that were acknowledged (it counts {reader.state().writes} of "
                    f"{number}): its log was deleted or cut; roll back, or index the source again"
                )


class Reader:
    """Queries within one transaction."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._sql = connection.execute

    def state(self) -> State:
        return State(**self._get("state"))

    def about(self) -> dict[str, Any]:
        return dict(self._get("about"))

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """Records of the rows from `start` to `stop`, ascending."""
        query = f"SELECT {_COLUMNS} FROM documents WHERE row >= ? AND row < ? ORDER BY row"
        return map(_checked, self._sql(query, (start, stop)))

    def records_of(self, rows: Sequence[int]) -> dict[int, Record]:
        query = f"SELECT {_COLUMNS} FROM documents WHERE row IN (SELECT value FROM json_each(?))"
        return {record[0]: _checked(record) for record in self._sql(query, (json.dumps(list(rows)),))}

    def rows_of(self, ids: Sequence[str]) -> list[int]:
        """Rows that hold these ids now, published or not."""
        found = (self._sql("SELECT row FROM names WHERE id = ?", (id,)).fetchone() for id in ids)
        return [entry[0] for entry in found if entry is not None]

    def deaths(self, after: int, upto: int) -> Rows:
        """Rows that disappeared with the publishes from `after` + 1 to `upto`."""
        found = self._sql("SELECT row, sequence, replaced, digest FROM deaths WHERE sequence > ? AND sequence <= ?",
                          (after, upto))  # fmt: skip
        return np.array([_intact(entry, "a deletion")[0] for entry in found], np.int32)

    def thumbnail(self, row: int) -> bytes | None:
        found = self._sql("SELECT row, png, digest FROM thumbnails WHERE row = ?", (row,)).fetchone()
        if found is None:
            return None
        if digest_of([found[0]], found[1]) != found[2]:
            raise Damaged("a thumbnail in the store is damaged; roll back, or index the source again")
        return bytes(found[1])

    def blobs(self) -> set[str]:
        """Names of the rendered uploads that documents refer to."""
        return {blob for (blob,) in self._sql("SELECT DISTINCT blob FROM documents WHERE blob IS NOT NULL")}

    def shards(self) -> list[Shard]:
        """In the order in which their vectors are numbered."""
        out = []
        for number, space, side, name, rows, digest in self._sql(
            "SELECT number, space, side, name, rows, digest FROM shards ORDER BY number"
        ):
            if digest_of([space, side, name], rows) != digest:
                raise Damaged("the store's list of vector shards is damaged; roll back, or index the source again")
            out.append(Shard(number, space, side, name, np.frombuffer(rows, "<i4")))
        return out

    def tail(self, space: str, side: Side, stop: int) -> tuple[Rows, list[NDArray[np.float32]]]:
        """Rows below `stop` whose vectors are not in a shard yet, ascending, and those vectors."""
        rows, vectors = [], []
        for row, vector, digest in self._sql(
            "SELECT row, vector, digest FROM tail WHERE space = ? AND side = ? AND row < ? ORDER BY row",
            (space, side, stop),
        ):
            if digest_of([row, space, side], vector) != digest:
                raise Damaged("a vector in the store is damaged; roll back, or index the source again")
            rows.append(row)
            vectors.append(np.frombuffer(vector, "<f4"))
        return np.array(rows, np.int32), vectors

    def _get(self, key: str) -> Any:
        found = self._sql("SELECT key, value, digest FROM facts WHERE key = ?", (key,)).fetchone()
        if found is None:
            raise Damaged("the store has lost its own description; roll back, or index the source again")
        return json.loads(_intact(found, "description")[1])


class Writer(Reader):
    """Changes within one transaction. `now` is the state as it will be."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        super().__init__(connection)
        self._connection = connection
        self.now = super().state()

    def add(self, records: Sequence[Record], thumbnails: Mapping[int, bytes]) -> None:
        """Documents in new rows, from `now.next` on. Whatever held their ids dies with the next publish."""
        replaced = self.rows_of([record.id for record in records])
        self._bury(replaced, replaced=True)
        self._many("INSERT INTO documents VALUES (?,?,?,?,?,?,?,?,?,?,?)", ((*r, digest_of(r)) for r in records))
        self._many("INSERT INTO names VALUES (?,?) ON CONFLICT(id) DO UPDATE SET row = excluded.row",
                   ((r.id, r.row) for r in records))  # fmt: skip
        pictures = ((row, png, digest_of([row], png)) for row, png in thumbnails.items())
        self._many("INSERT INTO thumbnails VALUES (?,?,?)", pictures)
        living = self.now.living + len(records) - len(replaced)
        self.now = self.now._replace(next=self.now.next + len(records), living=living)

    def remove(self, ids: Sequence[str]) -> int:
        """How many of `ids` there were."""
        rows = self.rows_of(ids)
        self._bury(rows, replaced=False)
        self._many("DELETE FROM names WHERE id = ?", ((id,) for id in ids))
        self.now = self.now._replace(living=self.now.living - len(rows))
        return len(rows)

    def add_tail(self, space: str, side: Side, rows: Rows, matrix: Matrix) -> None:
        """Vectors that are not in a shard yet."""
        pairs = zip(rows.tolist(), matrix, strict=True)
        entries = ((row, space, side, vector.astype("<f4").tobytes()) for row, vector in pairs)
        self._many("INSERT INTO tail VALUES (?,?,?,?,?)", ((*e, digest_of(e[:3], e[3])) for e in entries))

    def add_shard(self, space: str, side: Side, name: str, rows: Rows) -> None:
        """A sealed file of vectors. Those of its rows that were in the tail leave it."""
        held = rows.astype("<i4").tobytes()
        self._connection.execute("INSERT INTO shards(space, side, name, rows, digest) VALUES (?,?,?,?,?)",
                                 (space, side, name, held, digest_of([space, side, name], held)))  # fmt: skip
        if len(rows):
            self._many("DELETE FROM tail WHERE space = ? AND side = ? AND row = ?",
                       ((space, side, row) for row in rows.tolist()))  # fmt: skip

    def publish(self, manifest: str) -> None:
        """Shows everything. Removed documents are erased, replaced ones after a few more publishes."""
        sequence = self.now.sequence + 1
        self.now = self.now._replace(
            sequence=sequence, rows=self.now.next, documents=self.now.living, manifest=manifest
        )
        gone = f"""SELECT row FROM deaths WHERE sequence BETWEEN {sequence - REPLACED_KEPT - 1} AND {sequence}
                   AND (replaced = 0 OR sequence <= {sequence - REPLACED_KEPT})"""
        for table in ("documents", "thumbnails", "tail"):
            self._connection.execute(f"DELETE FROM {table} WHERE row IN ({gone})")

    def finish(self) -> None:
        self.now = self.now._replace(writes=self.now.writes + 1)
        _put(self._connection, "state", self.now._asdict())

    def _bury(self, rows: Sequence[int], replaced: bool) -> None:
        deaths = ((row, self.now.sequence + 1, int(replaced)) for row in rows)
        self._many("INSERT OR IGNORE INTO deaths VALUES (?,?,?,?)", ((*d, digest_of(d)) for d in deaths))

    def _many(self, statement: str, values: Iterable[Sequence[Any]]) -> None:
        self._connection.executemany(statement, values)


def _connect(path: Path) -> sqlite3.Connection:
    # Autocommit mode: transactions are ours. Threads share the list of connections only to close them.
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA secure_delete = ON")  # what is deleted is overwritten, not merely forgotten
    return connection


def _put(connection: sqlite3.Connection, key: str, value: Any) -> None:
    entry = (key, json.dumps(value))
    connection.execute("INSERT OR REPLACE INTO facts VALUES (?,?,?)", (*entry, digest_of(entry)))


def _intact(entry: Sequence[Any], what: str) -> Sequence[Any]:
    """The values before the digest that ends the entry; Damaged where they do not match it."""
    *values, digest = entry
    if digest_of(values) != digest:
        raise Damaged(f"{what} in the store is damaged; roll back, or index the source again")
    return values


def _checked(entry: Sequence[Any]) -> Record:
    return Record(*_intact(entry, "a document"))


def _counted(writes: int) -> bytes:
    text = b"%016x" % writes
    return text + b"%016x\n" % (int(text, 16) ^ 0xA5A5A5A5A5A5A5A5)


@contextmanager
def _sqlite(doing: str) -> Iterator[None]:
    """Turns SQLite's errors into ours, keeping the cause."""
    try:
        yield
    except sqlite3.OperationalError as error:
        text = str(error)
        if "full" in text or "disk I/O" in text:
            said = f"{doing}: the disk is full or failing ({text}); nothing that was there before has changed"
            raise BackendError(said) from error
        if "locked" in text:
            raise BackendError(f"{doing}: another process holds the database; try again") from error
        if "unable to open" in text or "readonly" in text:  # a reader leaves a mark beside the file, too
            said = f"{doing}: {text}; the collection's folder must be there and writable, also for searches"
            raise BackendError(said) from error
        raise BackendError(f"{doing}: {text}") from error
    except sqlite3.DatabaseError as error:
        raise Damaged(f"{doing}: it is damaged ({error}); roll back, or index the source again") from error
    except (UnicodeError, json.JSONDecodeError) as error:
        raise Damaged(f"{doing}: it is damaged; roll back, or index the source again") from error
