"""The decoding thread: rows join, leave, fail and end on their own."""

import math
import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.generate import generate, row_seed
from dparallel.serving.engine import Busy, Closed, Engine, Served, response_length
from dparallel.serving.jobs import Event, Failed, Finished, Job, Progress
from tests.conftest import random_model
from tests.dparallel.serving.conftest import SLOW

Wait = Callable[[Callable[[], bool]], None]


def job(served: Served, prompt: list[int], events: Callable[[Event], None], **settings) -> Job:
    decoding = settings.pop("decoding", served.decoding)
    seed = row_seed(decoding.seed, prompt)
    return Job(served.name, prompt, decoding.model_copy(update={"seed": None}), seed, events, **settings)


@contextmanager
def running(*models: Served, batch_size: int = 4, queue: int = 8) -> Iterator[Engine]:
    engine = Engine({served.name: served for served in models}, batch_size, queue)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


def last(events: queue.Queue) -> Finished | Failed:
    while isinstance(event := events.get(timeout=60), Progress):
        pass
    return event


def test_a_cancelled_row_is_free_after_one_forward_pass(endless: Served, until: Wait) -> None:
    events, others = queue.Queue[Event](), queue.Queue[Event]()
    with running(endless) as engine:
        cancelled, goes_on = job(endless, [5, 6], events.put), job(endless, [5], others.put)
        engine.submit([cancelled, goes_on])
        until(lambda: engine.running == 2)
        engine.cancel([cancelled])
        before = engine.forwards
        assert last(events).reason == "cancelled"
        assert engine.forwards <= before + 2  # the one that ran at that time, and the next
        until(lambda: engine.running == 1)
        engine.cancel([goes_on])
        assert last(others).reason == "cancelled"


def test_the_queue_is_bounded_and_the_rest_gets_its_turn(endless: Served, until: Wait) -> None:
    events = queue.Queue[Event]()
    with running(endless, batch_size=1, queue=2) as engine:
        jobs = [job(endless, [5 + place], events.put) for place in range(3)]
        engine.submit(jobs)
        until(lambda: engine.running == 1)
        with pytest.raises(Busy) as busy:
            engine.submit([job(endless, [9], events.put)])
        assert busy.value.retry_after >= 1
        engine.cancel(jobs[:2])  # one runs, one waits
        assert {last(events).reason, last(events).reason} == {"cancelled"}
        until(lambda: jobs[2].started is not None)
        engine.submit([job(endless, [9], events.put)])


def test_a_request_finds_place_for_all_its_responses_or_none(endless: Served) -> None:
    with running(endless, batch_size=1, queue=1) as engine:
        with pytest.raises(Busy):
            engine.submit([job(endless, [5], print) for _ in range(3)])
        assert engine.waiting == engine.running == 0


def test_time_is_limited_while_waiting_and_while_decoding(endless: Served) -> None:
    events = queue.Queue[Event]()
    with running(endless, batch_size=1) as engine:
        deadline = time.monotonic() + 0.2
        engine.submit([job(endless, [5], events.put, deadline=deadline) for _ in range(2)])
        assert [last(events).reason, last(events).reason] == ["timeout", "timeout"]
        assert engine.running == engine.waiting == 0


def test_what_is_not_finished_is_told_so_at_the_end(endless: Served) -> None:
    events = queue.Queue[Event]()
    with running(endless, batch_size=1) as engine:
        engine.submit([job(endless, [5], events.put) for _ in range(2)])
    assert {last(events).reason, last(events).reason} == {"shutdown"}
    with pytest.raises(Closed):
        engine.submit([job(endless, [5], print)])


def test_damaged_weights_fail_their_requests_only(endless: Served, teacher: Served) -> None:
    broken = random_model(max_position_embeddings=2048)
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    damaged = Served("damaged", broken, endless.tokenizer, SLOW.model_copy(update={"stop_at_eos": True}))
    events, others = queue.Queue[Event](), queue.Queue[Event]()
    with running(damaged, teacher) as engine:
        decoding = DecodingConfig(gen_length=8, block_length=8)
        engine.submit([job(damaged, [5], events.put, decoding=decoding), job(teacher, [14, 45], others.put)])
        assert last(events).reason == "weights"
        assert isinstance(last(others), Finished)


@pytest.mark.slow  # memory is collected, which takes a second beside everything that tests import
def test_a_forward_pass_that_fails_ends_its_requests_only(teacher: Served) -> None:
    """A token beyond the vocabulary, which `check_prompts` refuses, cannot be embedded."""
    events, others = queue.Queue[Event](), queue.Queue[Event]()
    with running(teacher) as engine:
        engine.submit(
            [job(teacher, [10_000], events.put), job(teacher, [14, 45], others.put, decoding=other())]
        )
        assert last(events).reason == "error"
        assert isinstance(last(others), Finished)
        assert engine.alive


def other() -> DecodingConfig:
    return DecodingConfig(gen_length=16, block_length=8)


def test_a_listener_that_is_gone_frees_the_row(endless: Served, until: Wait) -> None:
    def gone(event: Event) -> None:
        raise RuntimeError("Event loop is closed")

    with running(endless) as engine:
        engine.submit([job(endless, [5], gone, progress=True, drafts=True)])
        until(lambda: engine.forwards > 0)
        until(lambda: engine.running == 0)


def test_progress_grows_and_ends_with_the_response(teacher: Served) -> None:
    prompt = teacher.tokenizer.encode("Tom has 3 coins .")
    events, seen = queue.Queue[Event](), list[Event]()
    with running(teacher) as engine:
        engine.submit([job(teacher, prompt, events.put, progress=True, drafts=True)])
        while not seen or isinstance(seen[-1], Progress):
            seen.append(events.get(timeout=60))
    [alone] = generate(teacher.model, [prompt], teacher.decoding)
    finished = seen[-1]
    assert isinstance(finished, Finished)
    assert finished.tokens == alone.tokens[: alone.num_tokens]
    assert finished.nfe == alone.nfe == len(seen)
    for step, event in enumerate(seen):
        assert event.tokens == finished.tokens[: len(event.tokens)]
        assert event.draft.denoise_step == step
        for position, token, commit in zip(
            event.draft.positions, event.draft.tokens, event.draft.committed, strict=True
        ):
            assert not commit or (alone.tokens[position], alone.commit_step[position]) == (token, step)


@pytest.mark.parametrize(
    ("tokens", "done", "most", "length"),
    [
        ([5, 6], False, None, None),
        ([5, 6], False, 2, 2),
        ([5, 6], False, 3, None),
        ([5, 2, 2], True, None, 2),
        ([5, 6, 7], True, None, 3),
        ([5, 2, 2], True, 3, 2),
        ([5, 6, 7], True, 2, 2),
        ([2, 2], True, None, 1),
    ],
)
def test_length_of_a_response(tokens: list[int], done: bool, most: int | None, length: int | None) -> None:
    asked = Job("any", [], DecodingConfig(), 0, print, max_tokens=most)
    assert response_length(tokens, done, [2], asked) == length


def test_a_stop_ends_a_response_before_its_end_token() -> None:
    asked = Job("any", [], DecodingConfig(), 0, print, stop=lambda tokens: 1 if len(tokens) > 1 else None)
    assert response_length([5, 6, 2], True, [2], asked) == 1
    assert response_length([5, 2], True, [2], asked) == 2
