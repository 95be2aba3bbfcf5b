"""Hand events of the decoding thread to the event loop, many for each time that the loop is woken."""

import asyncio
from collections import deque
from typing import Generic, TypeVar

Event = TypeVar("Event")


class Mailbox(Generic[Event]):
    """Events that one other thread posts to queues of an event loop, in the order of posting.

    Waking a loop is a system call, for which the posting thread gives up the interpreter. A forward pass has
    an event for each row of its batch, of which only the first wakes the loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._posted = deque[tuple[asyncio.Queue[Event], Event]]()
        self._woken = False

    def post(self, queue: asyncio.Queue[Event], event: Event) -> None:
        """Put an event into an unbounded queue of the loop; called from the other thread.

        Raises:
            RuntimeError: the loop is closed.
        """
        self._posted.append((queue, event))
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                self._woken = False
                raise

    def _deliver(self) -> None:
        self._woken = False  # what is posted from now on wakes the loop again
        while self._posted:
            queue, event = self._posted.popleft()
            queue.put_nowait(event)
