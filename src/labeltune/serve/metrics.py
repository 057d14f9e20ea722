"""Figures for Prometheus; one registry a server."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """What is counted; labels hold routes and names of runs, never what a client made up."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "labeltune_requests", "Requests by route and status", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "labeltune_request_seconds",
            "Seconds from the request's head to its last byte",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.in_progress = Gauge(
            "labeltune_requests_in_progress", "Requests being answered", registry=self.registry
        )
        self.rows = Counter("labeltune_rows", "Texts answered", ["model"], registry=self.registry)
        self.batch_rows = Histogram(
            "labeltune_batch_rows", "Texts of a batch", ["model"], buckets=_ROWS, registry=self.registry
        )
        self.batch_seconds = Histogram(
            "labeltune_batch_seconds",
            "Seconds the model took for a batch",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.waiting = Gauge("labeltune_queue_rows", "Texts that wait for the model", registry=self.registry)

    def watch_queue(self, waiting: Callable[[], int]) -> None:
        """Ask for the length of the queue whenever the figures are read."""
        self.waiting.set_function(lambda: float(waiting()))

    def on_batch(self, model: str, rows: int, seconds: float) -> None:
        """A batch is done."""
        self.rows.labels(model).inc(rows)
        self.batch_rows.labels(model).observe(rows)
        self.batch_seconds.labels(model).observe(seconds)

    def on_request(self, route: str, status: int, seconds: float) -> None:
        """A request is done."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
