"""What the server counts: for the page's Metrics, and for Prometheus."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter, deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from app.result import Result

# Upper ends, in seconds, of the buckets of latency.
BOUNDS = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
# Latest images that percentiles are taken of.
WINDOW = 512


class Metrics:
    """Counts since the start, and the latest latencies. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._images: Counter[str] = Counter()
        self._batches: Counter[int] = Counter()
        self._latest: dict[str, deque[float]] = {}
        self._buckets: dict[str, list[int]] = {}
        self._sums: Counter[str] = Counter()

    def count(self, name: str, by: int = 1) -> None:
        """One more of "busy", "cancelled", "failed", ..."""
        with self._lock:
            self._counts[name] += by

    def replaced(self, by: int) -> None:
        if by:
            self.count("replaced", by)

    def drawn(self, result: Result, latency: float) -> None:
        """An image that was asked for `latency` seconds ago."""
        model = result.request.model
        with self._lock:
            self._counts["images"] += 1
            self._images[model] += 1
            self._batches[result.batch] += 1
            self._latest.setdefault(model, deque(maxlen=WINDOW)).append(latency)
            buckets = self._buckets.setdefault(model, [0] * (len(BOUNDS) + 1))
            buckets[bisect_left(BOUNDS, latency)] += 1
            self._sums[model] += latency

    def counts(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)

    def summary(self) -> dict[str, Any]:
        """Per model the images, p50 and p95 in seconds of the latest; how many images had which batch size."""
        with self._lock:
            models = {
                name: {"images": self._images[name], "window": len(kept), "p50": _at(kept, 0.5), "p95": _at(kept, 0.95)}
                for name, kept in self._latest.items()
            }  # fmt: skip
            return {
                "models": models,
                "batches": dict(sorted(self._batches.items())),
                "counts": dict(self._counts),
            }

    def prometheus(self, queue: int, ready: bool) -> str:
        """Everything in Prometheus' text format."""
        with self._lock:
            lines = [
                "# TYPE stepdistill_ready gauge", f"stepdistill_ready {int(ready)}",
                "# TYPE stepdistill_queue gauge", f"stepdistill_queue {queue}",
                "# TYPE stepdistill_images_total counter",
                *(f'stepdistill_images_total{{model="{name}"}} {n}' for name, n in self._images.items()),
                "# TYPE stepdistill_events_total counter",
                *(f'stepdistill_events_total{{kind="{name}"}} {n}' for name, n in self._counts.items() if name != "images"),
                "# TYPE stepdistill_batch_images_total counter",
                *(f'stepdistill_batch_images_total{{size="{size}"}} {n}' for size, n in sorted(self._batches.items())),
                "# TYPE stepdistill_latency_seconds histogram",
            ]  # fmt: skip
            for name, buckets in self._buckets.items():
                total = 0
                for bound, count in zip((*BOUNDS, "+Inf"), buckets, strict=True):
                    total += count
                    lines.append(f'stepdistill_latency_seconds_bucket{{model="{name}",le="{bound}"}} {total}')
                lines += [
                    f'stepdistill_latency_seconds_sum{{model="{name}"}} {self._sums[name]:.6f}',
                    f'stepdistill_latency_seconds_count{{model="{name}"}} {total}',
                ]
        return "\n".join(lines) + "\n"


def _at(values: deque[float], share: float) -> float:
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 4)
