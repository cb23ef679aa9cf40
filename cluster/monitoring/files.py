"""Every file that Prometheus and Grafana read, as text: for one cluster, or as examples. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import yaml

from cluster import metrics
from cluster.monitoring.alerts import rules
from cluster.monitoring.dashboard import FOLDER, FOLDER_UID, SOURCE_NAME, SOURCE_UID, dashboard

JOB = "roundhouse"
SCRAPE_S = 10
"""Ray passes numbers on every ten seconds; asking more often shows nothing more."""
DASHBOARD = "grafana/dashboards/roundhouse.json"
HEAD = "# Written by `roundhouse monitor`; what it says comes from cluster/monitoring/.\n"


@dataclass(frozen=True, slots=True)
class Place:
    """What differs from one cluster to the next."""

    discovery: str
    """URL of Ray's service discovery."""
    token_file: str
    """Holds the cluster's token; relative paths count from the file that names it."""
    prometheus: str
    """URL under which Grafana finds Prometheus."""
    dashboards: str
    """Directory that Grafana reads dashboards from."""


EXAMPLE = Place(
    discovery="http://127.0.0.1:8265/api/prometheus/sd",
    token_file="../../.roundhouse/auth/token",
    prometheus="http://127.0.0.1:9090",
    dashboards="/var/lib/grafana/dashboards/roundhouse",
)
"""Of configs/monitoring/: a checkout's own cluster on the usual ports."""


def rendered(place: Place) -> dict[str, str]:
    """Return every file's text by its path below the monitoring directory."""
    return {
        "prometheus.yml": _yaml(prometheus(place)),
        "alerts.yml": _yaml(rules()),
        DASHBOARD: json.dumps(dashboard(), indent=2) + "\n",
        "grafana/provisioning/dashboards/roundhouse.yml": _yaml(_provider(place)),
        "grafana/provisioning/datasources/roundhouse.yml": _yaml(_sources(place)),
    }


def prometheus(place: Place) -> dict[str, Any]:
    """Return Prometheus' configuration: Ray says which targets there are, behind its token."""
    return {
        "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"},
        "rule_files": ["alerts.yml"],
        "scrape_configs": [
            {
                "job_name": JOB,
                "http_sd_configs": [
                    {
                        "url": place.discovery,
                        "refresh_interval": "15s",
                        "authorization": {
                            "type": "Bearer",
                            "credentials_file": place.token_file,
                        },
                    }
                ],
                # the discovery says `ray` for every cluster
                "relabel_configs": [{"target_label": "job", "replacement": JOB}],
                "metric_relabel_configs": [
                    {
                        # Ray makes it up from the buckets' middles; the means lie in counters
                        "source_labels": ["__name__"],
                        "regex": f"{metrics.EXPORTED}.+_seconds_sum",
                        "action": "drop",
                    },
                    {"regex": "otel_scope_.*", "action": "labeldrop"},
                ],
            }
        ],
    }


def source(url: str) -> dict[str, Any]:
    """Return the data source, as Grafana's interface and its provisioning files both take it."""
    return {
        "name": SOURCE_NAME,
        "uid": SOURCE_UID,
        "type": "prometheus",
        "access": "proxy",
        "url": url,
        "jsonData": {"timeInterval": f"{SCRAPE_S}s", "httpMethod": "POST"},
    }


def _sources(place: Place) -> dict[str, Any]:
    return {"apiVersion": 1, "datasources": [source(place.prometheus)]}


def _provider(place: Place) -> dict[str, Any]:
    return {
        "apiVersion": 1,
        "providers": [
            {
                "name": "roundhouse",
                "folder": FOLDER,
                "folderUid": FOLDER_UID,
                "type": "file",
                "allowUiUpdates": False,
                "options": {"path": place.dashboards},
            }
        ],
    }


def _yaml(value: dict[str, Any]) -> str:
    return HEAD + yaml.safe_dump(value, sort_keys=False, width=1000, allow_unicode=True)
