"""Limits that keep a server answering under load and abuse."""

from pydantic import PositiveFloat, PositiveInt

from dparallel.config.base import Config


class Limits(Config):
    """What a server accepts.

    Attributes:
        batch_size: responses decoded at a time.
        queue: responses that may wait; further requests are answered with 429.
        context: tokens of a prompt with its response; by default what the model can hold.
        timeout: seconds from the arrival of a request to the end of its response.
        body_bytes: size of a request.
        body_seconds: time in which a request has to arrive.
        choices: responses of one request (`n` times the number of prompts).
        heartbeat: seconds between comments in a stream without news, which keep proxies from closing it.
    """

    batch_size: PositiveInt = 32
    queue: PositiveInt = 256
    context: PositiveInt | None = None
    timeout: PositiveFloat = 600.0
    body_bytes: PositiveInt = 2**20
    body_seconds: PositiveFloat = 30.0
    choices: PositiveInt = 128
    heartbeat: PositiveFloat = 15.0

    @property
    def most_choices(self) -> int:
        """Responses of one request that ever find a place together."""
        return min(self.choices, self.batch_size + self.queue)
