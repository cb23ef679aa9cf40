"""The tier's shared fixtures."""

from __future__ import annotations

from tests.ray.cluster_fixtures import cluster

__all__ = ["cluster"]
