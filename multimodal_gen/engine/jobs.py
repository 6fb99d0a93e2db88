"""Jobs that outlive the process: one row each in SQLite, on the disk before anybody is told that the job was accepted.

Everything here is synchronous and belongs to one thread (`OneThread`), which is also the one writer of the database.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import msgspec

from multimodal_gen.errors import ConfigError, IdempotencyMismatch, QueueFull, StorageFull
from multimodal_gen.media.recipe import VideoFormat
from multimodal_gen.request import VideoRequest

SCHEMA = 1
RETRY_AFTER_S = 30.0
# How long a client that resends a request by itself, without an Idempotency-Key, finds the job of the first sending.
RESENT_S = 600

Status = Literal["queued", "in_progress", "completed", "failed"]

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One job as its row holds it, but for the request; times are whole seconds since the epoch."""

    number: int = 0
    """order of acceptance; filled by `Jobs.add`"""
    id: str
    owner: str
    """fingerprint of the API key"""
    status: Status = "queued"
    progress: int = 0
    """0 to 100, as of the last checkpoint; while the job runs the runner knows better"""
    model: str
    """as the client knows it, like the three that follow"""
    prompt: str
    seconds: str
    size: str
    outputs: int
    output_format: VideoFormat
    facts: str
    """JSON: what else the client is shown of the settled request"""
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    error_code: str | None = None
    error_message: str | None = None
    remixed_from: str | None = None
    idempotency_key: str | None = None
    body_hash: str
    """of what the client asked for, whatever the encoding"""
    priority: int
    fair_key: str
    cost: int
    """token-steps"""
    crashes: int = 0
    """worker processes that died while they ran it"""

    @property
    def finished(self) -> bool:
        """Whether nothing will happen to it any more but its expiry."""
        return self.status in ("completed", "failed")


_COLUMNS = tuple(field.name for field in msgspec.structs.fields(Job))
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM jobs"
_TABLES = """
CREATE TABLE jobs (
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, status TEXT NOT NULL,
  progress INTEGER NOT NULL, model TEXT NOT NULL, prompt TEXT NOT NULL, seconds TEXT NOT NULL, size TEXT NOT NULL,
  outputs INTEGER NOT NULL, output_format TEXT NOT NULL, facts TEXT NOT NULL, created_at INTEGER NOT NULL,
  completed_at INTEGER, expires_at INTEGER, error_code TEXT, error_message TEXT, remixed_from TEXT,
  idempotency_key TEXT, body_hash TEXT NOT NULL, priority INTEGER NOT NULL, fair_key TEXT NOT NULL,
  cost INTEGER NOT NULL, crashes INTEGER NOT NULL
) STRICT;
CREATE UNIQUE INDEX jobs_by_key ON jobs (owner, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX jobs_by_owner ON jobs (owner, number);
CREATE INDEX jobs_by_status ON jobs (status);
CREATE TABLE requests (job INTEGER PRIMARY KEY, request BLOB NOT NULL) STRICT;
"""
_UNFINISHED = "status IN ('queued', 'in_progress')"


class OneThread:
    """Runs functions one after another in a thread of its own; what comes later sees what came before."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def __call__(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The function's result. Raises: what it raises."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: work(*args, **kwargs))

    def close(self) -> None:
        """Wait for what runs; nothing can be run any more."""
        self._pool.shutdown(wait=True)


class Jobs:
    """The table of jobs."""

    def __init__(self, path: Path) -> None:
        """Opens the database, or makes it. Raises: ConfigError when it is none, or of a later version."""
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._migrate(path)
        except sqlite3.Error as error:
            raise ConfigError(f"The job database {path} cannot be used: {error}.", param="data_dir") from None

    def close(self) -> None:
        """Let go of the database."""
        self._db.close()

    def add(self, job: Job, request: VideoRequest, max_unfinished: int) -> Job:
        """Write a new job and return it; or the one that was made with the same key and body.

        It is on the disk when this returns. Raises: IdempotencyMismatch, QueueFull, StorageFull.
        """
        return self._transact(lambda: self._add(job, request, max_unfinished))

    def find(self, job_id: str, owner: str | None = None) -> Job | None:
        """One job, of that owner where one is given."""
        found = self._one(f"{_SELECT} WHERE id = ?", job_id)
        return found if found is not None and owner in (None, found.owner) else None

    def find_key(self, owner: str, key: str, body_hash: str) -> Job | None:
        """The job made with an Idempotency-Key. Raises: IdempotencyMismatch when its body was another."""
        found = self._one(f"{_SELECT} WHERE owner = ? AND idempotency_key = ?", owner, key)
        if found is not None and found.body_hash != body_hash:
            raise IdempotencyMismatch(
                f"Idempotency-Key {key[:64]!a} was used for another request; use a new key for a new request."
            )
        return found

    def find_resent(self, owner: str, body_hash: str, now: int) -> Job | None:
        """The newest job of the same body that was made a moment ago."""
        where = "owner = ? AND body_hash = ? AND created_at > ? ORDER BY number DESC LIMIT 1"
        return self._one(f"{_SELECT} WHERE {where}", owner, body_hash, now - RESENT_S)

    def page(self, owner: str, after: int | None, limit: int, *, newest_first: bool, now: int) -> list[Job]:
        """At most `limit` jobs of an owner that have not expired, in order of acceptance, after the one numbered so."""
        sign, order = ("<", "DESC") if newest_first else (">", "ASC")
        start = after if after is not None else (1 << 62 if newest_first else 0)
        return self._all(
            f"{_SELECT} WHERE owner = ? AND number {sign} ? AND (expires_at IS NULL OR expires_at > ?) "
            f"ORDER BY number {order} LIMIT ?",
            *(owner, start, now, limit),
        )

    def unfinished(self) -> list[Job]:
        """Jobs that wait or run, in order of acceptance."""
        return self._all(f"{_SELECT} WHERE {_UNFINISHED} ORDER BY number")

    def expired(self, now: int) -> list[Job]:
        """Finished jobs whose time is over."""
        return self._all(f"{_SELECT} WHERE expires_at <= ?", now)

    def ids(self) -> dict[str, bool]:
        """Every job's id, and whether it is finished."""
        rows = self._read("SELECT id, status FROM jobs")
        return {row[0]: row[1] in ("completed", "failed") for row in rows}

    def request(self, job_id: str) -> VideoRequest:
        """The request as it was accepted. Raises: KeyError for a job that is gone."""
        rows = self._read("SELECT request FROM requests JOIN jobs ON job = number WHERE id = ?", job_id)
        if not rows:
            raise KeyError(job_id)
        return msgspec.msgpack.decode(rows[0][0], type=VideoRequest)

    def update(self, job_id: str, **fields: Any) -> None:
        """Change columns of a job that is there and has not ended; on the disk when this returns.

        Raises: StorageFull.
        """
        assert fields.keys() <= set(_COLUMNS), fields.keys()
        names = ", ".join(f"{name} = ?" for name in fields)
        where = f"id = ? AND {_UNFINISHED}"
        self._transact(lambda: self._db.execute(f"UPDATE jobs SET {names} WHERE {where}", (*fields.values(), job_id)))

    def delete(self, job_id: str) -> bool:
        """Forget a job; whether there was one. Raises: StorageFull."""

        def work() -> bool:
            self._db.execute("DELETE FROM requests WHERE job = (SELECT number FROM jobs WHERE id = ?)", (job_id,))
            return self._db.execute("DELETE FROM jobs WHERE id = ?", (job_id,)).rowcount > 0

        return self._transact(work)

    def _add(self, job: Job, request: VideoRequest, max_unfinished: int) -> Job:
        if job.idempotency_key is not None:
            known = self.find_key(job.owner, job.idempotency_key, job.body_hash)
            if known is not None:
                return known
        ((unfinished,),) = self._read(f"SELECT count(*) FROM jobs WHERE {_UNFINISHED}")
        if unfinished >= max_unfinished:
            raise QueueFull(
                f"{unfinished:,} videos wait or run, which is the limit of this server (--max-jobs). Try again later.",
                retry_after=RETRY_AFTER_S,
            )
        values = {name: value for name, value in msgspec.structs.asdict(job).items() if name != "number"}
        marks = ", ".join("?" * len(values))
        cursor = self._db.execute(f"INSERT INTO jobs ({', '.join(values)}) VALUES ({marks})", (*values.values(),))
        assert cursor.lastrowid is not None, "an INSERT has a row"
        self._db.execute("INSERT INTO requests VALUES (?, ?)", (cursor.lastrowid, msgspec.msgpack.encode(request)))
        return msgspec.structs.replace(job, number=cursor.lastrowid)

    def _migrate(self, path: Path) -> None:
        ((version,),) = self._db.execute("PRAGMA user_version").fetchall()
        if version > SCHEMA:
            raise ConfigError(
                f"The job database {path} was made by a later version of multimodal_gen; use that version, or another "
                "--data-dir.",
                param="data_dir",
            )
        if version == 0:
            self._db.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {SCHEMA}; COMMIT;")

    def _transact(self, work: Callable[[], T]) -> T:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                result = work()
                self._db.execute("COMMIT")
            except BaseException:
                # A full disk has rolled back by itself already.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise _storage(error) from None
        return result

    def _read(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise _storage(error) from None

    def _all(self, query: str, *values: object) -> list[Job]:
        rows = self._read(query, *values)
        return [msgspec.convert(dict(zip(_COLUMNS, row, strict=True)), Job) for row in rows]

    def _one(self, query: str, *values: object) -> Job | None:
        return next(iter(self._all(query, *values)), None)


def _storage(error: sqlite3.Error) -> StorageFull:
    log.error("the job database failed: %s", error)
    full = "full" in str(error)
    return StorageFull(
        f"Jobs cannot be stored: {'the disk is full' if full else 'the job database cannot be used'}. Tell whoever "
        "runs this server."
    )
