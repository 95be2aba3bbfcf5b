"""Measurements of a server in Prometheus' format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dparallel.serving.engine import Engine
from dparallel.serving.jobs import Finished, Job

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
PER_FORWARD = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class Metrics:
    """Counters of one server; each server has a registry of its own."""

    def __init__(self, engine: Engine):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "dparallel_requests", "Answered requests", ["endpoint", "status"], registry=registry
        )
        self.failed = Counter(
            "dparallel_failed_responses", "Responses that were not finished", ["reason"], registry=registry
        )
        self.responses = Counter("dparallel_responses", "Finished responses", registry=registry)
        self.prompt_tokens = Counter("dparallel_prompt_tokens", "Tokens of prompts", registry=registry)
        self.tokens = Counter("dparallel_tokens", "Tokens of finished responses", registry=registry)
        self.row_forwards = Counter(
            "dparallel_nfe", "Forward passes, each counted for every response in it", registry=registry
        )
        self.per_forward = Histogram(
            "dparallel_tokens_per_forward", "Of a response", registry=registry, buckets=PER_FORWARD
        )
        self.queued = _seconds("dparallel_queue_seconds", "Until a response took a row", registry)
        self.first_token = _seconds(
            "dparallel_time_to_first_token_seconds", "From the request to the first text", registry
        )
        self.duration = _seconds("dparallel_response_seconds", "From the request to its end", registry)
        forwards = Gauge("dparallel_forwards", "Forward passes since the start", registry=registry)
        forwards.set_function(lambda: engine.forwards)
        running = Gauge("dparallel_running", "Responses that have a row", registry=registry)
        running.set_function(lambda: engine.running)
        waiting = Gauge("dparallel_waiting", "Responses in the queue", registry=registry)
        waiting.set_function(lambda: engine.waiting)

    def finished(self, job: Job, response: Finished, now: float) -> None:
        """Count a response that ended at `now` (`time.monotonic`)."""
        self.responses.inc()
        self.tokens.inc(len(response.tokens))
        self.row_forwards.inc(response.nfe)
        self.per_forward.observe(len(response.tokens) / max(1, response.nfe))
        self.duration.observe(now - job.submitted)
        self.queued.observe((job.started or now) - job.submitted)

    def text(self) -> bytes:
        """All measurements, as `/metrics` answers."""
        return generate_latest(self.registry)


def _seconds(name: str, text: str, registry: CollectorRegistry) -> Histogram:
    return Histogram(name, text, registry=registry, buckets=SECONDS)
