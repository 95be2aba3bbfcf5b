"""The decoding thread: rows join the running batch between two forward passes, and leave it when they end.

Rows of equal model and decoding (apart from seeds) share forward passes. Others take turns, a forward pass
each, so that no request waits for another to finish.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.loop import Forward
from dparallel.decoding.memory import rows_that_fit
from dparallel.decoding.pool import Look, Pool
from dparallel.decoding.stops import before_end
from dparallel.models.backbone import DiffusionTransformer
from dparallel.models.loader import release_memory
from dparallel.models.threads import fitting_threads
from dparallel.serving.jobs import Draft, Event, Failed, Finished, Job, Progress

log = logging.getLogger(__name__)

SMOOTHING = 0.1  # weight of the latest response in the mean time of a response

Key = tuple[str, DecodingConfig, bool]  # rows of equal keys share forward passes: model, decoding, infill


@dataclass(frozen=True)
class Served:
    """A model that is served, and how it decodes where a request does not say."""

    name: str
    model: DiffusionTransformer
    tokenizer: PreTrainedTokenizerBase
    decoding: DecodingConfig


class Busy(Exception):
    """The queue is full; `retry_after` is the time in seconds after which it probably is not."""

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"{waiting} responses are waiting already: try again in {retry_after} s")
        self.retry_after = retry_after


class Closed(Exception):
    """The server is shutting down."""


class Engine:
    """Decodes jobs in a thread of its own, up to `batch_size` at a time, in the order of their arrival.

    All methods may be called from any thread.
    """

    def __init__(self, models: Mapping[str, Served], batch_size: int, queue: int):
        """
        Args:
            batch_size: rows decoded at a time, over all models and decodings.
            queue: jobs that may wait for a row.
        """
        self.models, self.batch_size, self.queue = models, batch_size, queue
        self.forwards = 0
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: dict[Key, tuple[Pool, dict[int, Job]]] = {}  # pools, and the job of each slot
        self._open = 0  # jobs that are accepted and not ended
        self._closed = False
        self._seconds = 1.0  # mean time from taking a row to the end of the response
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    @property
    def waiting(self) -> int:
        """Jobs without a row."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs with a row."""
        return sum(len(jobs) for _, jobs in list(self._running.values()))

    @property
    def alive(self) -> bool:
        """Whether the decoding thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread; what is decoded or waits fails. A server drains before."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, all of them or none.

        Raises:
            Busy: not all of them find a place.
            Closed: the server is shutting down.
        """
        with self._changed:
            if self._closed:
                raise Closed
            beyond = self._open + len(jobs) - self.batch_size
            if beyond > self.queue:
                rounds = beyond / self.batch_size
                raise Busy(len(self._waiting), max(1, math.ceil(rounds * self._seconds)))
            self._open += len(jobs)
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End jobs before the next forward pass; those that have ended already stay as they are."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._changed.notify()

    # What follows runs in the decoding thread.

    def _run(self) -> None:
        models = [served.model for served in self.models.values()]
        largest = max(models, key=lambda model: sum(weight.numel() for weight in model.parameters()))
        try:
            with torch.inference_mode(), fitting_threads(largest, self.batch_size):
                while self._next_round():
                    key = next(iter(self._running), None)
                    if key is not None:
                        self._running[key] = self._running.pop(key)  # the others come first
                        self._advance(key)
        finally:  # also after a bug of this loop: no request waits for a thread that has ended
            with self._changed:
                self._closed = True
                for job in self._all_jobs():
                    self._tell(job, Failed("shutdown", "the server ended before the response was finished"))

    def _next_round(self) -> bool:
        """Remove what was cancelled or is overdue, give free rows to waiting jobs; False at the end."""
        with self._changed:
            if not self._running and not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return False
            arrived = [job for job in self._waiting if not self._dropped(job)]
            self._waiting.clear()
            self._waiting.extend(arrived)
        for key, (pool, jobs) in list(self._running.items()):
            self._leave(key, pool, [slot for slot, job in jobs.items() if self._dropped(job)])
        while self._waiting and self.running < self.batch_size and self._started(self._waiting[0]):
            with self._changed:
                self._waiting.popleft()
        return True

    def _dropped(self, job: Job) -> bool:
        """Whether a job has ended from outside, which its listener is told."""
        if job.cancelled:
            self._tell(job, Failed("cancelled", "the request was cancelled"))
        elif time.monotonic() > job.deadline:
            self._tell(job, Failed("timeout", "the request took longer than the server's limit of time"))
        return job.ended

    def _started(self, job: Job) -> bool:
        """Give a row to a job; False if it has to wait for memory. A job that can never start fails."""
        key = job.model, job.decoding, job.gap is not None
        served = self.models[job.model]
        try:
            with _on(served.model):
                pool, jobs = self._running.get(key) or (Pool(served.model, job.decoding, key[2]), {})
                length = len(job.prompt) + (0 if key[2] else job.decoding.gen_length)
                if rows_that_fit(served.model, length, job.decoding) <= len(pool) and self._running:
                    return False
                slot = pool.join(job.prompt, job.seed)
        except (MemoryError, torch.OutOfMemoryError) as error:
            if self._running:
                return False
            self._tell(job, Failed("memory", str(error)))
            return True
        except Exception:
            log.exception("a request could not be started")
            self._tell(job, Failed("error", "the server failed to start this request; its log says more"))
            return True
        job.started = time.monotonic()
        jobs[slot] = job
        self._running[key] = pool, jobs
        return True

    def _advance(self, key: Key) -> None:
        """A forward pass of one pool, and what follows for its jobs; if it fails, only they do."""
        pool, jobs = self._running[key]
        served = self.models[key[0]]
        try:
            with _on(served.model):
                forward, done = pool.forward()
                slots = forward.rows
                self.forwards += 1
                read = np.array(
                    [bool(end) or jobs[slot].watched for slot, end in zip(slots, done, strict=True)]
                )
                if not read.any():
                    return
                look = pool.look(slots[read])
                drafts = _drafts(forward, [jobs[slot].drafts for slot in slots])
            ended = [
                slot
                for row, (slot, end) in enumerate(zip(slots[read].tolist(), done[read], strict=True))
                if self._reported(served, jobs[slot], look, row, bool(end), drafts.get(slot))
            ]
            self._leave(key, pool, ended)
        except Exception as error:
            memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
            log.exception("a forward pass failed; its %d requests fail", len(jobs))
            self._running.pop(key, None)
            for job in jobs.values():
                if memory:
                    self._tell(
                        job, Failed("memory", "not enough memory for this request now; try again later")
                    )
                else:
                    self._tell(job, Failed("error", "decoding failed; the server's log says more"))
            del pool
            release_memory()

    def _reported(
        self, served: Served, job: Job, look: Look, row: int, done: bool, draft: Draft | None
    ) -> bool:
        """Tell a job what a forward pass did to its row; returns whether the response is finished."""
        count = len(look.tokens[row]) if done else int(look.committed[row])
        tokens = look.tokens[row][:count].tolist()
        confidence = look.confidence[row][:count].tolist()
        if job.gap is not None:  # an end token in a gap ends nothing, and is no text
            ends = served.model.config.end_token_ids
            kept = [place for place, token in enumerate(tokens[: job.gap]) if token not in ends]
            tokens, confidence = [tokens[place] for place in kept], [confidence[place] for place in kept]
            count = len(kept)
        if not np.isfinite(look.confidence[row]).all():
            self._tell(
                job, Failed("weights", "the model's logits are NaN or infinite: its weights are damaged")
            )
            return True
        if draft is not None:
            draft = replace(draft, denoise_step=int(look.nfe[row]) - 1)
        length = response_length(tokens, done, served.model.config.end_token_ids, job)
        if length is None:
            if job.progress and (count > job.told or draft is not None):
                job.told = count
                self._tell(job, Progress(tokens, confidence, draft))
            return False
        assert job.started is not None
        seconds = time.monotonic() - job.started
        self._tell(job, Finished(tokens[:length], confidence[:length], int(look.nfe[row]), seconds, draft))
        self._seconds += SMOOTHING * (seconds - self._seconds)
        return True

    def _leave(self, key: Key, pool: Pool, slots: Sequence[int]) -> None:
        if not slots:
            return
        pool.leave(slots)
        _, jobs = self._running[key]
        for slot in slots:
            del jobs[slot]
        if not jobs:
            del self._running[key]

    def _tell(self, job: Job, event: Event) -> None:
        """Send an event; a listener that is gone cancels its job."""
        if job.ended:
            return
        if not isinstance(event, Progress):
            job.ended = True
            with self._changed:
                self._open -= 1
        try:
            job.listen(event)
        except Exception:  # its event loop is closed
            log.debug("a listener is gone", exc_info=True)
            job.cancelled = True

    def _all_jobs(self) -> Iterator[Job]:
        yield from self._waiting
        for _, jobs in self._running.values():
            yield from jobs.values()


def response_length(tokens: Sequence[int], done: bool, end_token_ids: Sequence[int], job: Job) -> int | None:
    """Number of tokens of a response, from its final tokens; None if it goes on.

    Args:
        tokens: the tokens before the first position that is masked or may change.
        done: whether the loop has finished the row.
    """
    before = before_end(tokens, end_token_ids)
    lengths = [min(len(before) + 1, len(tokens))] if done else []
    if job.stop is not None and (stopped := job.stop(before)) is not None:
        lengths.append(stopped)
    if job.max_tokens is not None and len(tokens) >= job.max_tokens:
        lengths += [job.max_tokens, min(len(before) + 1, len(tokens))]
    return min(lengths, default=None)


def _drafts(forward: Forward, wanted: Sequence[bool]) -> dict[int, Draft]:
    """What a forward pass predicted in the rows that want it, by slot; without `denoise_step`."""
    columns = (forward.offsets, forward.token, forward.probability, forward.new)
    return {
        int(slot): Draft(0, *(column[row][forward.read[row]].tolist() for column in columns))
        for row, slot in enumerate(forward.rows)
        if wanted[row]
    }


def _on(model: DiffusionTransformer) -> AbstractContextManager[object]:
    """The model's device as the current one."""
    return torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext()
