"""Alert rules for Prometheus: what somebody should look at, and what to look at first. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster import metrics

TOO_OLD_S = 3600


@dataclass(frozen=True, slots=True)
class Alert:
    """One rule; ``summary`` and ``look`` are for the person that it wakes."""

    name: str
    expr: str
    held: str
    """How long it must be so, as Prometheus writes it."""
    severity: str
    summary: str
    look: str


def _slow(timing: metrics.Timing, quantile: float) -> str:
    by = "sum by (le, model_name)"
    return f"histogram_quantile({quantile}, {by} (rate({timing.spread.series}_bucket[5m])))"


_HTTP = metrics.HTTP_REQUESTS.series
_GAUGE = "max by (model_name)"

ALERTS = (
    Alert(
        "RoundhouseFirstTokenSlow",
        f"{_slow(metrics.TIME_TO_FIRST_TOKEN, 0.95)} > 5",
        "10m",
        "warning",
        "{{ $labels.model_name }}: one first token in twenty takes longer than 5 s",
        "Waiting requests and the KV cache of this model; more replicas, or a lower max_queued.",
    ),
    Alert(
        "RoundhouseServerErrors",
        f'sum(rate({_HTTP}{{code="5xx"}}[5m])) / sum(rate({_HTTP}[5m])) > 0.05',
        "5m",
        "critical",
        "{{ $value | humanizePercentage }} of all HTTP answers are server errors",
        "`roundhouse status`, then the log of the gateway and of the replica it names.",
    ),
    Alert(
        "RoundhouseReplicaDown",
        "min by (application) (ray_serve_deployment_replica_healthy) < 1",
        "2m",
        "critical",
        "a replica of {{ $labels.application }} is not healthy",
        "`roundhouse status`; the replica's log says what its health check found.",
    ),
    Alert(
        "RoundhouseAppNotRunning",
        "max by (application) (ray_serve_application_status) < 6",
        "10m",
        "critical",
        "{{ $labels.application }} does not run",
        "`roundhouse status` gives the reason; `roundhouse deploy` again once it is mended.",
    ),
    Alert(
        "RoundhouseQueueFull",
        f'sum by (model_name) (rate({metrics.REQUEST_FAILURE.series}{{reason="busy"}}[5m])) > 0',
        "5m",
        "warning",
        "{{ $labels.model_name }} turns requests away, for want of room",
        "More replicas, or a larger max_concurrent where memory allows it.",
    ),
    Alert(
        "RoundhouseCacheFull",
        f"{_GAUGE} ({metrics.CACHE_USAGE.series}) > 0.95",
        "10m",
        "warning",
        "the KV cache of {{ $labels.model_name }} is full",
        "cache_tokens and max_model_len of its engine.",
    ),
    Alert(
        "RoundhouseTrainingStalled",
        f"{_GAUGE} ({metrics.TRAIN_STEP.series}) < {_GAUGE} "
        f"({metrics.TRAIN_STEPS_PLANNED.series}) and on (model_name) "
        f"sum by (model_name) (rate({metrics.TRAIN_STEPS.series}[15m])) == 0",
        "15m",
        "warning",
        "the run on {{ $labels.model_name }} takes no more steps",
        "The job's log; a rank that is stuck in a collective is killed after its time-out.",
    ),
    Alert(
        "RoundhouseCheckpointOld",
        f"time() - {_GAUGE} ({metrics.TRAIN_CHECKPOINT_TIME.series}) > {TOO_OLD_S}",
        "5m",
        "warning",
        "the last checkpoint of the run on {{ $labels.model_name }} is over an hour old",
        "run.save_every, and whether the disk is full.",
    ),
    Alert(
        "RoundhouseNodeUnseen",
        'up{job="roundhouse"} == 0',
        "2m",
        "critical",
        "{{ $labels.instance }} gives Prometheus no samples",
        "Whether the node lives, and whether its metrics port can be reached.",
    ),
    Alert(
        "RoundhouseMemoryShort",
        "max by (ip) (ray_node_mem_used / ray_node_mem_total) > 0.9",
        "5m",
        "warning",
        "{{ $labels.ip }} has less than a tenth of its memory left",
        "`roundhouse status`; Ray kills a process of its own choice at 95 %.",
    ),
)


def rules() -> dict[str, Any]:
    """Return the content of a Prometheus rule file."""
    return {"groups": [{"name": "roundhouse", "rules": [_rule(alert) for alert in ALERTS]}]}


def _rule(alert: Alert) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": alert.expr,
        "for": alert.held,
        "labels": {"severity": alert.severity},
        "annotations": {"summary": alert.summary, "description": alert.look},
    }
