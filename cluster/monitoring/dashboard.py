"""The dashboard as Grafana reads it, built from the rows of `cluster.monitoring.board`. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cluster import metrics
from cluster.monitoring.board import ROWS
from cluster.monitoring.panels import Panel, Row

# Ray's dashboards have uids that begin with `ray`, and their own folder, which Ray rewrites at
# every head start: nothing of ours goes there.
UID = "roundhouse-overview"
FOLDER_UID = "roundhouse"
FOLDER = "Roundhouse"
SOURCE_UID = "roundhouse-prometheus"
SOURCE_NAME = "Roundhouse Prometheus"
SCHEMA = 39
"""Of Grafana 10.4, which later ones read."""
WIDTH, HEIGHT, STAT_HEIGHT = 24, 8, 4
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard(rows: Sequence[Row] = ROWS) -> dict[str, Any]:
    """Return the dashboard's JSON model."""
    return {
        "uid": UID,
        "title": "Roundhouse",
        "tags": ["roundhouse"],
        "schemaVersion": SCHEMA,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_source(), _model()]},
        "annotations": {"list": []},
        "panels": list(_laid_out(rows)),
    }


def _source() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "current": {"text": SOURCE_NAME, "value": SOURCE_UID},
        "hide": 0,
    }


def _model() -> dict[str, Any]:
    query = f'label_values({{__name__=~"{metrics.EXPORTED}.+"}}, model_name)'
    return {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": "model"},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _laid_out(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Yield headings and panels from left to right, with ids that stay while rows only grow."""
    y = 0
    for place, row in enumerate(rows, 1):
        at = {"h": 1, "w": WIDTH, "x": 0, "y": y}
        yield {
            "id": place * 100,
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "gridPos": at,
            "panels": [],
        }
        x, y, line = 0, y + 1, 0
        for number, panel in enumerate(row.panels, 1):
            height = STAT_HEIGHT if panel.kind == "stat" else HEIGHT
            if x + panel.width > WIDTH:
                x, y, line = 0, y + line, 0
            at = {"h": height, "w": panel.width, "x": x, "y": y}
            yield _panel(place * 100 + number, panel, at)
            x, line = x + panel.width, max(line, height)
        y += line


def _panel(number: int, panel: Panel, at: dict[str, int]) -> dict[str, Any]:
    options: dict[str, Any] = {
        "timeseries": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "stat": {
            "colorMode": "none",
            "graphMode": "area",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        },
    }
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.told,
        "datasource": SOURCE,
        "gridPos": at,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": options[panel.kind],
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "datasource": SOURCE,
                "expr": query.expr,
                "legendFormat": query.legend,
                "range": True,
            }
            for place, query in enumerate(panel.queries)
        ],
    }
