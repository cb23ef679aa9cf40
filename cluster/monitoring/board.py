"""The rows of the dashboard: which questions it answers. Pure."""

from __future__ import annotations

from cluster import metrics
from cluster.monitoring.panels import (
    MODELS,
    Panel,
    Query,
    Row,
    curve,
    gauge,
    number,
    or_zero,
    rate,
    spread,
)

FAILED = rate(metrics.HTTP_REQUESTS, where='code="5xx"')
HTTP = rate(metrics.HTTP_REQUESTS, where="")
GENERATE = 'route=~"/v1/(chat/)?completions"'
MODEL = "{{model_name}}"
AWAY = gauge(metrics.MODEL_ASLEEP, how="min")
VERSION = "{{model_name}}@{{model_version}}"
BY_VERSION = "model_name, model_version"

OVERVIEW = Row(
    "Overview",
    (
        number("Answers a second", or_zero(rate(metrics.REQUEST_SUCCESS)), "reqps"),
        number("Tokens a second", or_zero(rate(metrics.GENERATION_TOKENS))),
        number("Running requests", f"sum({metrics.RUNNING.series}{{{MODELS}}})"),
        number("Waiting requests", f"sum({metrics.WAITING.series}{{{MODELS}}})"),
        number(
            "Server errors",
            f"({or_zero(FAILED)}) / clamp_min({HTTP}, 1e-9)",
            "percentunit",
            "Share of all HTTP answers.",
        ),
        number("Healthy replicas", "sum(ray_serve_deployment_replica_healthy)"),
        curve(
            "Versions that answer",
            f"{gauge(metrics.VERSION_ACTIVE, BY_VERSION)} > 0",
            VERSION,
            told="Replicas by the version that is active in them.",
        ),
        curve(
            "HTTP answers by outcome",
            rate(metrics.HTTP_REQUESTS, "code", ""),
            "{{code}}",
            "reqps",
            "gone: the client left. A stream that breaks counts as its error event says.",
        ),
        curve(
            "HTTP answers by route", rate(metrics.HTTP_REQUESTS, "route", ""), "{{route}}", "reqps"
        ),
    ),
)

LATENCY = Row(
    "Latency",
    (
        Panel("Time to first token", spread(metrics.TIME_TO_FIRST_TOKEN), "s"),
        Panel("Time between tokens", spread(metrics.INTER_TOKEN), "s"),
        Panel("Whole answer", spread(metrics.E2E), "s", told="In the replica; answers that ended."),
        Panel(
            "At the gateway",
            spread(metrics.HTTP, GENERATE),
            "s",
            told="Routes that generate, from the request's head to the last byte; refusals too.",
        ),
    ),
)

TOKENS = Row(
    "Tokens",
    (
        curve("Generated tokens", rate(metrics.GENERATION_TOKENS, BY_VERSION), VERSION),
        curve("Prompt tokens", rate(metrics.PROMPT_TOKENS, BY_VERSION), VERSION),
        Panel(
            "Tokens an answer",
            (
                Query(
                    f"{rate(metrics.PROMPT_TOKENS)} / {rate(metrics.TIME_TO_FIRST_TOKEN.count)}",
                    "prompt",
                ),
                Query(
                    f"{rate(metrics.GENERATION_TOKENS)} / "
                    f"{rate(metrics.TIME_TO_FIRST_TOKEN.count)}",
                    "generated",
                ),
            ),
        ),
        curve(
            "Answers by how they ended",
            rate(metrics.REQUEST_SUCCESS, "finished_reason"),
            "{{finished_reason}}",
            "reqps",
        ),
        curve(
            "Answers that did not end",
            or_zero(rate(metrics.REQUEST_FAILURE, "reason")),
            "{{reason}}",
            "reqps",
            "refused: wrong; busy: no room; cancelled: the client left; engine, error: ours.",
        ),
    ),
)

QUEUE = Row(
    "Queue and cache",
    (
        Panel(
            "Requests in the engines",
            (
                Query(gauge(metrics.RUNNING), f"{MODEL} running"),
                Query(gauge(metrics.WAITING), f"{MODEL} waiting"),
            ),
        ),
        Panel(
            "Wait for the engine",
            spread(metrics.QUEUE),
            "s",
            told="From the engine's admission to the first step of a prompt.",
        ),
        curve(
            "Prompt tokens from the cache",
            f"({or_zero(rate(metrics.CACHED_TOKENS))}) / {rate(metrics.PROMPT_TOKENS)}",
            "share",
            "percentunit",
        ),
        curve(
            "KV cache in use",
            gauge(metrics.CACHE_USAGE, how="max"),
            MODEL,
            "percentunit",
            "Of the fullest replica.",
        ),
    ),
)

MEMORY = Row(
    "Memory of models",
    (
        Panel(
            "Models",
            (
                Query(f"count({AWAY} == 0) or vector(0)", "in memory"),
                Query(f"count({AWAY} == 1) or vector(0)", "asleep"),
            ),
            told="A model is in memory as long as one of its replicas is.",
        ),
        curve(
            "Memory of the ranks",
            gauge(metrics.MODEL_MEMORY),
            MODEL,
            "bytes",
            "Resident, of all ranks; 0 of a model that sleeps.",
        ),
        curve("Wake-ups a minute", or_zero(f"60 * {rate(metrics.WAKEUPS)}"), "wake-ups"),
        curve(
            "Seconds a wake-up",
            or_zero(f"({rate(metrics.WAKEUP_SECONDS)} > 0) / {rate(metrics.WAKEUPS)}"),
            "mean",
            "s",
            "0 while none wakes.",
        ),
    ),
)

TRAINING = Row(
    "Training",
    (
        curve("Loss", gauge(metrics.TRAIN_LOSS, how="max"), MODEL),
        curve("Held-out loss", gauge(metrics.TRAIN_HELDOUT_LOSS, how="max"), MODEL),
        curve(
            "What the objective says",
            gauge(metrics.TRAIN_FIGURE, "model_name, figure", "max"),
            f"{MODEL} {{{{figure}}}}",
            told="Of the last step: accuracies, rewards, margins, by the objective's names.",
        ),
        curve(
            "What it says of held-out rows",
            gauge(metrics.TRAIN_HELDOUT_FIGURE, "model_name, figure", "max"),
            f"{MODEL} {{{{figure}}}}",
        ),
        curve("Learning rate", gauge(metrics.TRAIN_LR, how="max"), MODEL),
        curve("Gradient norm", gauge(metrics.TRAIN_GRAD_NORM, how="max"), MODEL),
        curve("Tokens a second, training", gauge(metrics.TRAIN_RATE), MODEL),
        curve(
            "Seconds a step",
            f"{rate(metrics.TRAIN_SECONDS, 'model_name')} / "
            f"{rate(metrics.TRAIN_STEPS, 'model_name')}",
            MODEL,
            "s",
        ),
        curve(
            "Progress",
            f"{gauge(metrics.TRAIN_STEP, how='max')} / "
            f"{gauge(metrics.TRAIN_STEPS_PLANNED, how='max')}",
            MODEL,
            "percentunit",
        ),
        curve("Time left", gauge(metrics.TRAIN_ETA, how="max"), MODEL, "s"),
        curve(
            "Age of the last checkpoint",
            f"time() - {gauge(metrics.TRAIN_CHECKPOINT_TIME, how='max')}",
            MODEL,
            "s",
        ),
    ),
)

CLUSTER = Row(
    "Cluster",
    (
        curve("CPU", "avg by (ip) (ray_node_cpu_utilization)", "{{ip}}", "percent"),
        curve(
            "Memory",
            "sum by (ip) (ray_node_mem_used) / sum by (ip) (ray_node_mem_total)",
            "{{ip}}",
            "percentunit",
        ),
        curve(
            "Object store", "sum by (Location) (ray_object_store_memory)", "{{Location}}", "bytes"
        ),
        curve(
            "GPU",
            or_zero("avg by (ip) (ray_node_gpus_utilization)"),
            "{{ip}}",
            "percent",
            "0 on machines without one.",
        ),
        Panel(
            "Logical CPUs",
            (Query('sum by (State) (ray_resources{Name="CPU"})', "{{State}}"),),
        ),
        Panel(
            "Nodes and replicas",
            (
                Query("count(count by (ip) (ray_node_cpu_count))", "nodes"),
                Query("sum(ray_serve_deployment_replica_healthy)", "healthy replicas"),
            ),
        ),
    ),
)

ROWS = (OVERVIEW, LATENCY, TOKENS, QUEUE, MEMORY, TRAINING, CLUSTER)
