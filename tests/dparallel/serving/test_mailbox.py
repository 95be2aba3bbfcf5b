"""Events of another thread reach the queues of an event loop in order, with few wakings."""

import asyncio
import threading

import pytest

from dparallel.serving.mailbox import Mailbox


def test_events_arrive_in_order_and_the_first_of_many_wakes_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        loop, wakings = asyncio.get_running_loop(), 0
        wake = loop.call_soon_threadsafe

        def counted(*arguments):
            nonlocal wakings
            wakings += 1
            return wake(*arguments)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        mailbox, queues = Mailbox[int](loop), [asyncio.Queue[int](), asyncio.Queue[int]()]

        def post(numbers: range) -> None:
            for number in numbers:
                mailbox.post(queues[number % 2], number)

        post(range(100))  # the loop runs nothing else meanwhile
        assert (wakings, queues[0].qsize()) == (1, 0)
        thread = threading.Thread(target=post, args=[range(100, 5000)])
        thread.start()
        got = [[await queue.get() for _ in range(2500)] for queue in queues]
        thread.join()
        assert got == [list(range(0, 5000, 2)), list(range(1, 5000, 2))]

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_closed_loop_is_said_every_time() -> None:
    loop = asyncio.new_event_loop()
    mailbox, queue = Mailbox[int](loop), asyncio.Queue[int]()
    loop.close()
    for number in range(2):
        with pytest.raises(RuntimeError, match="closed"):
            mailbox.post(queue, number)
