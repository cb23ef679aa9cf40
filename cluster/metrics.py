"""Every metric that Roundhouse exports: name, kind, labels, buckets. Pure data.

Ray exports each as ``ray_roundhouse_<name>`` (a counter with ``_total`` behind it) and adds labels
of its own, of which ``WorkerId`` tells processes apart: queries sum it away. Names end as vLLM's
do, so that a query written for vLLM works with another prefix; the OpenTelemetry name of the same
thing stands beside them where there is one.

Label values come from closed sets: the models that are deployed, integer versions (``live`` for
one that is on the shelf only), the kind of engine, routes of the gateway, classes of status codes.
Never a path, a key, a user or a text.

Ray rebuilds a histogram's ``_sum`` from the middles of its buckets, which is wrong by a lot; so
each histogram of seconds has counters beside it, whose quotient is the true mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]

PREFIX = "roundhouse_"
"""Of the name that Ray is given."""
EXPORTED = f"ray_{PREFIX}"
"""Of the name in Prometheus."""
EXPORT_S = 10.0
"""How often Ray passes a process's numbers on: nothing is seen sooner."""
LIVE = "live"
NONE = "none"
OTHER = "other"


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """One metric; its name carries the unit where it has one. Each exists once: ``is`` decides."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram. Ray takes the first it sees on a node: never two opinions."""
    otel: str | None = None
    """OpenTelemetry's name for it."""

    @property
    def series(self) -> str:
        """The name in Prometheus; a histogram's ends in ``_bucket`` or ``_count`` there."""
        return f"{EXPORTED}{self.name}{'_total' if self.kind == 'counter' else ''}"


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one kind: spread in the histogram, mean as ``seconds / count``."""

    spread: Metric
    seconds: Metric
    count: Metric


def version_label(version: str | None) -> str:
    """Return the label of a version ``name@number``; ``live`` when it is on the shelf only."""
    if version is None:
        return NONE
    number = version.rpartition("@")[2]
    return number if number.isascii() and number.isdecimal() else LIVE


MODEL = ("model_name", "model_version", "engine")

# OpenTelemetry's and vLLM's bounds of the time to the first token, to vLLM's minutes
FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5),
    *(0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
TOKEN_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2),
    *(0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
)
REQUEST_S = tuple(round(0.01 * 2**power, 2) for power in range(15))
"""0.01 doubling to 163.84."""


def _counter(name: str, told: str, labels: tuple[str, ...], otel: str | None = None) -> Metric:
    return Metric(name, "counter", told, labels, otel=otel)


def _gauge(name: str, told: str, labels: tuple[str, ...] = MODEL) -> Metric:
    return Metric(name, "gauge", told, labels)


# --- a replica ---------------------------------------------------------------------------------

FINISHED = ("stop", "length", "tool_calls", "content_filter")
REQUEST_SUCCESS = _counter(
    "request_success", "Answers that ended, by finished_reason.", (*MODEL, "finished_reason")
)
FAILURES = ("refused", "busy", "cancelled", "engine", "error")
"""A request that was wrong; no room for it; the client left; the engine failed; a bug."""
REQUEST_FAILURE = _counter(
    "request_failure", "Answers that did not end, by reason.", (*MODEL, "reason")
)
PROMPT_TOKENS = _counter(
    "prompt_tokens", "Tokens of prompts that got a first token.", MODEL, "gen_ai.client.token.usage"
)
GENERATION_TOKENS = _counter(
    "generation_tokens", "Tokens generated.", MODEL, "gen_ai.client.token.usage"
)
TIME_TO_FIRST_TOKEN = Timing(
    Metric(
        "time_to_first_token_seconds",
        "histogram",
        "From the replica's admission to the first token.",
        MODEL,
        FIRST_TOKEN_S,
        "gen_ai.server.time_to_first_token",
    ),
    _counter("first_token_seconds", "Seconds spent until first tokens.", MODEL),
    _counter("first_tokens", "First tokens.", MODEL),
)
INTER_TOKEN = Timing(
    Metric(
        "inter_token_latency_seconds",
        "histogram",
        "Seconds a token after the first, one sample a chunk.",
        MODEL,
        TOKEN_S,
        "gen_ai.server.time_per_output_token",
    ),
    _counter("inter_token_seconds", "Seconds spent between tokens.", MODEL),
    _counter("inter_tokens", "Tokens after the first of their answer.", MODEL),
)
E2E = Timing(
    Metric(
        "e2e_request_latency_seconds",
        "histogram",
        "From the replica's admission to the end of an answer that ended well.",
        MODEL,
        REQUEST_S,
        "gen_ai.server.request.duration",
    ),
    _counter("request_seconds", "Seconds spent on answers that ended well.", MODEL),
    REQUEST_SUCCESS,
)
QUEUE = Timing(
    Metric(
        "request_queue_time_seconds",
        "histogram",
        "From the engine's admission to the first step of a prompt.",
        MODEL,
        FIRST_TOKEN_S,
    ),
    _counter("request_queue_seconds", "Seconds that prompts waited for their first step.", MODEL),
    TIME_TO_FIRST_TOKEN.count,
)
CACHED_TOKENS = _counter(
    "prefix_cache_hits", "Tokens of prompts that the prefix cache held.", MODEL
)
RUNNING = _gauge("num_requests_running", "Requests in the engine's steps.")
WAITING = _gauge("num_requests_waiting", "Requests that wait for the engine.")
CACHE_USAGE = _gauge("kv_cache_usage_perc", "Share of the KV cache in use; 1 is all of it.")
VERSION_ACTIVE = _gauge("version_active", "1 for the version that answers, 0 for one that did.")

OF_MODEL = ("model_name",)
MODEL_ASLEEP = _gauge("model_asleep", "1 where a replica's memory is free, else 0.", OF_MODEL)
MODEL_MEMORY = _gauge(
    "model_memory_bytes", "Resident memory of a replica's ranks; 0 of those that sleep.", OF_MODEL
)
WAKEUPS = _counter("model_wakeups", "Times that a replica has come back into memory.", OF_MODEL)
WAKEUP_SECONDS = _counter("model_wakeup_seconds", "Seconds that this took.", OF_MODEL)

REPLICA = (
    *(REQUEST_SUCCESS, REQUEST_FAILURE, PROMPT_TOKENS, GENERATION_TOKENS),
    *(TIME_TO_FIRST_TOKEN.spread, TIME_TO_FIRST_TOKEN.seconds, TIME_TO_FIRST_TOKEN.count),
    *(INTER_TOKEN.spread, INTER_TOKEN.seconds, INTER_TOKEN.count),
    *(E2E.spread, E2E.seconds),
    *(QUEUE.spread, QUEUE.seconds, CACHED_TOKENS),
    *(RUNNING, WAITING, CACHE_USAGE, VERSION_ACTIVE),
    *(MODEL_ASLEEP, MODEL_MEMORY, WAKEUPS, WAKEUP_SECONDS),
)

# --- the gateway -------------------------------------------------------------------------------

CODES = ("2xx", "3xx", "4xx", "5xx", "gone")
"""``gone``: the client left. A stream that ends with an error event counts as the event says."""
HTTP_REQUESTS = _counter("http_requests", "Requests by route and outcome.", ("route", "code"))
HTTP = Timing(
    Metric(
        "http_request_duration_seconds",
        "histogram",
        "From the request's head to the last byte of its answer; routes that generate.",
        ("route",),
        REQUEST_S,
        "http.server.request.duration",
    ),
    _counter("http_request_seconds", "Seconds spent on requests, by route.", ("route",)),
    HTTP_REQUESTS,
)

GATEWAY = (HTTP.spread, HTTP.seconds, HTTP_REQUESTS)

# --- training, rank 0 --------------------------------------------------------------------------

TRAIN_STEP = _gauge("train_step", "Optimiser steps done.")
TRAIN_STEPS_PLANNED = _gauge("train_steps_planned", "Optimiser steps of the whole run.")
TRAIN_LOSS = _gauge("train_loss", "Mean loss over the trained tokens of the last step.")
TRAIN_HELDOUT_LOSS = _gauge("train_heldout_loss", "Loss on the held-out rows, last measured.")
TRAIN_FIGURE = _gauge(
    "train_figure", "What the objective says of the last step, by name.", (*MODEL, "figure")
)
TRAIN_HELDOUT_FIGURE = _gauge(
    "train_heldout_figure", "What it says of the held-out rows, by name.", (*MODEL, "figure")
)
TRAIN_RATE = _gauge("train_tokens_per_second", "Tokens a second since the run began.")
TRAIN_GRAD_NORM = _gauge("train_grad_norm", "Gradient norm before clipping, last step.")
TRAIN_LR = _gauge("train_learning_rate", "Learning rate, last step.")
TRAIN_ETA = _gauge("train_eta_seconds", "Seconds that the remaining steps will take.")
TRAIN_CHECKPOINT_TIME = _gauge(
    "train_checkpoint_timestamp_seconds", "When the last checkpoint was complete (Unix time)."
)
TRAIN_STEPS = _counter("train_steps", "Optimiser steps.", MODEL)
TRAIN_SECONDS = _counter("train_step_seconds", "Seconds spent on optimiser steps.", MODEL)
TRAIN_TOKENS = _counter("train_trained_tokens", "Tokens that the loss was taken over.", MODEL)

TRAIN_GAUGES: Mapping[str, Metric] = {
    "step": TRAIN_STEP,
    "steps": TRAIN_STEPS_PLANNED,
    "loss": TRAIN_LOSS,
    "tokens_per_s": TRAIN_RATE,
    "grad_norm": TRAIN_GRAD_NORM,
    "lr": TRAIN_LR,
    "eta_s": TRAIN_ETA,
}
"""By the key of a step's record in ``metrics.jsonl``."""
TRAIN_COUNTERS: Mapping[str, Metric] = {
    "step_s": TRAIN_SECONDS,
    "trained_tokens": TRAIN_TOKENS,
}

TRAINING = (
    *TRAIN_GAUGES.values(),
    *TRAIN_COUNTERS.values(),
    *(TRAIN_STEPS, TRAIN_HELDOUT_LOSS, TRAIN_CHECKPOINT_TIME),
    *(TRAIN_FIGURE, TRAIN_HELDOUT_FIGURE),
)

ALL = (*REPLICA, *GATEWAY, *TRAINING)
