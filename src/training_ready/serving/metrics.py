"""How is the service doing? The counts that TGI exposes, under TGI's names, in Prometheus' text format.

Durations are summaries (sum and count, seconds), where TGI has histograms.
"""

from __future__ import annotations

import threading
from collections import defaultdict

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_HELP = {
    "tgi_request_count": "Requests for generation or tokenisation",
    "tgi_request_success": "Answers that were finished",
    "tgi_request_failure": "Requests that failed, by error type",
    "tgi_request_cancelled": "Answers given up because the client left",
    "tgi_request_duration": "Seconds from arrival to the last token",
    "tgi_request_queue_duration": "Seconds from admission to the first step",
    "tgi_request_inference_duration": "Seconds from the first step to the last",
    "tgi_request_mean_time_per_token_duration": "Seconds per generated token, mean of each request",
    "tgi_request_input_length": "Prompt tokens",
    "tgi_request_generated_tokens": "Generated tokens",
    "tgi_queue_size": "Requests that wait for the worker",
    "tgi_batch_current_size": "Answers that are open",
}


class Metrics:
    """Counters and sums, safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: defaultdict[tuple[str, str], int] = defaultdict(int)
        self._sums: dict[str, tuple[float, int]] = {}

    def count(self, name: str, *, err: str = "") -> None:
        with self._lock:
            self._counters[name, err] += 1

    def observe(self, name: str, value: float) -> None:
        with self._lock:
            total, number = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value, number + 1)

    def render(self, **gauges: int) -> str:
        """The exposition, with the ``gauges`` as they are now."""
        with self._lock:
            counters, sums = dict(self._counters), dict(self._sums)
        lines = []
        for name in sorted({name for name, _ in counters}):
            lines += _head(name, "counter")
            for (counter, err), value in sorted(counters.items()):
                if counter == name:
                    lines.append(f'{name}{{err="{err}"}} {value}' if err else f"{name} {value}")
        for name, (total, number) in sorted(sums.items()):
            lines += [*_head(name, "summary"), f"{name}_sum {total!r}", f"{name}_count {number}"]
        for name, value in sorted(gauges.items()):
            lines += [*_head(name, "gauge"), f"{name} {value}"]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str) -> list[str]:
    return [f"# HELP {name} {_HELP[name]}", f"# TYPE {name} {kind}"]
