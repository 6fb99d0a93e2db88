"""Changes of jobs' rows, on a disk that may be full for a while."""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from multimodal_gen.engine.jobs import Job, Jobs, OneThread
from multimodal_gen.errors import StorageFull

log = logging.getLogger(__name__)


class JobRows:
    """What the database could not take yet is kept here, shown by `current`, and tried again: a full disk must not take
    down what is computed. All methods belong to one event loop."""

    def __init__(self, jobs: Jobs, disk: OneThread) -> None:
        self._jobs = jobs
        self._disk = disk
        self._unwritten: dict[str, dict[str, Any]] = {}  # job → columns

    async def update(self, job_id: str, **fields: Any) -> bool:
        """Change columns; whether the database has them."""
        self._unwritten[job_id] = self._unwritten.get(job_id, {}) | fields
        return await self._write(job_id)

    async def retry(self) -> None:
        """Try again what could not be written."""
        for job_id in list(self._unwritten):
            await self._write(job_id)

    def forget(self, job_id: str) -> None:
        """The job is gone."""
        self._unwritten.pop(job_id, None)

    def current(self, job: Job) -> Job:
        """A job from the database, with what that does not know."""
        unwritten = self._unwritten.get(job.id)
        return msgspec.structs.replace(job, **unwritten) if unwritten else job

    async def _write(self, job_id: str) -> bool:
        fields = self._unwritten.get(job_id, {})
        try:
            await self._disk(self._jobs.update, job_id, **fields)
        except StorageFull as error:
            log.error("the state of job %s is not written: %s", job_id, error.message)
            return False
        if self._unwritten.get(job_id) is fields:  # nothing was added meanwhile
            del self._unwritten[job_id]
        return True
