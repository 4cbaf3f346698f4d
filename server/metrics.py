"""Prometheus metrics of one process. Labels never hold ids, texts or collection content."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

STAGE_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

REQUESTS = Counter("lightbox_requests_total", "HTTP requests", ["method", "route", "status"])
SECONDS = Histogram("lightbox_request_seconds", "Time to answer a request", ["route"], buckets=STAGE_BUCKETS)
STAGES = Histogram(
    "lightbox_stage_seconds", "Time of one stage of a batch of searches", ["stage"], buckets=STAGE_BUCKETS
)
BATCH = Histogram("lightbox_search_batch_size", "Searches answered together", buckets=(1, 2, 4, 8, 16, 32))
WAITING = Gauge("lightbox_searches_waiting", "Searches accepted and not yet answered")
REFUSED = Counter("lightbox_searches_refused_total", "Searches turned away because too many were waiting")
