"""``serve_apps.app:build``: the one import path in rendered Serve files.

Plain classes become deployments here and only here.
"""

# No `from __future__ import annotations` in this file: Serve turns the arguments of a YAML file
# into BuildArgs only if the annotation is a class; given a string it hands over the raw dict.

import asyncio
import logging
from typing import Any

from ray import serve
from ray.serve.config import BackpressureConfig

from serve_apps.config import (
    FRONT_CPUS,
    GATEWAY,
    REPLICA,
    BuildArgs,
    GatewayArgs,
    GatewaySettings,
    Limits,
    ModelArgs,
    ModelConfig,
)

GATEWAY_STREAMS = 512
GATEWAY_QUEUE = 128
MARGIN = 16
"""Calls beyond what the engine takes that still reach it, to be refused there with a reason."""
HEALTH_PERIOD_S = 3.0
HEALTH_TIMEOUT_S = 10.0

log = logging.getLogger(__name__)


class ServedReplica:
    """What Serve runs for a model: a Replica with the cluster's collaborators."""

    async def __init__(self, config: dict[str, Any], revision: str) -> None:  # type: ignore[misc]
        """Start the engine and load the version that answers; Serve awaits constructors."""
        from cluster import logs
        from cluster.library.store import Library
        from cluster.meter import RayMeter
        from cluster.metrics import REPLICA as METRICS
        from serve_apps.engine.open import open_engine
        from serve_apps.engine.restart import Restartable
        from serve_apps.releases_actor import RemoteReleases
        from serve_apps.replica import Replica
        from serve_apps.shelf import NodeShelf

        logs.speak()
        model = ModelConfig.model_validate(config)
        who = serve.get_replica_context().replica_id.unique_id
        board = RemoteReleases(revision)
        engine, meter = Restartable(lambda: open_engine(model.engine)), RayMeter(METRICS)
        self._replica = Replica(model, engine, Library(), board, who, meter, NodeShelf(who))
        try:
            await self._replica.start()
        except BaseException:
            await self._replica.stop()
            raise

    async def generate(self, call: Any) -> Any:
        """See :meth:`Replica.generate`."""
        stream = self._replica.generate(call)
        try:
            async for event in stream:
                yield event
        finally:
            await stream.aclose()

    async def sample(self, ask: Any) -> Any:
        """See :meth:`Replica.sample`."""
        return await self._replica.sample(ask)

    async def check_health(self) -> None:
        """See :meth:`Replica.check_health`."""
        await self._replica.check_health()

    async def __del__(self) -> None:
        """Serve awaits this after the last request has ended, or its grace time has."""
        if hasattr(self, "_replica"):
            await self._replica.stop()


class ServedGateway:
    """What Serve runs in front: the gateway over this cluster's models."""

    async def __init__(self, revision: str) -> None:  # type: ignore[misc]
        """Make sure that the Releases actor runs this code, and follow it."""
        from cluster import logs
        from cluster.home import keys_dir
        from cluster.keys import KeyStore
        from cluster.meter import RayMeter
        from cluster.metrics import GATEWAY as METRICS
        from serve_apps.gateway.app import Gateway
        from serve_apps.gateway.counting import hand_on
        from serve_apps.gateway.metering import HttpMeter
        from serve_apps.gateway.samples import Samples, node_export
        from serve_apps.gateway.serve_backend import ServeBackend
        from serve_apps.gateway.traffic import Traffic
        from serve_apps.releases_actor import RemoteReleases, renew_releases

        logs.speak()
        await renew_releases(revision)
        self._keys = KeyStore(keys_dir())
        releases, traffic = RemoteReleases(revision), Traffic()
        self._backend = ServeBackend(releases)
        samples = Samples(node_export)
        self._gateway = Gateway(self._backend, Limits(), samples=samples, traffic=traffic)
        self._meter = HttpMeter(RayMeter(METRICS))
        self._following = asyncio.create_task(self._backend.follow())
        self._counting = asyncio.create_task(hand_on(traffic, releases))

    def __serve_build_asgi_app__(self) -> Any:
        from serve_apps.gateway.app import make_app

        # Serve's proxy adds the request id's header itself
        return make_app(self._backend, self._keys, self._gateway, tag=False, meter=self._meter)

    def reconfigure(self, settings: dict[str, Any]) -> None:
        """Take new limits and models; what runs keeps those it began with."""
        new = GatewaySettings.model_validate(settings)
        self._gateway.limits, self._backend.expected = new.limits, new.models
        memory = new.limits.models_memory_gb
        self._backend.budget = None if memory is None else int(memory * 1e9)

    async def check_health(self) -> None:
        """Raise when the gateway has stopped following releases."""
        for task in (self._following, self._counting):
            if task.done():
                raise RuntimeError(f"releases are not followed any more: {task}")


def build(args: BuildArgs) -> serve.Application:
    """Return the application that ``args`` describes: the gateway, or one model's."""
    match BuildArgs.model_validate(args).app:
        case GatewayArgs() as gateway:
            return _gateway(gateway)
        case ModelArgs() as model:
            return _model(model)


def _gateway(args: GatewayArgs) -> serve.Application:
    deployment = serve.deployment(
        serve.ingress()(ServedGateway),
        name=GATEWAY,
        ray_actor_options={"num_cpus": FRONT_CPUS},
        max_ongoing_requests=GATEWAY_STREAMS,
        max_queued_requests=GATEWAY_QUEUE,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=2),
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=30.0,
        # a new build stands beside the old one until it is ready: no gap
        max_surge_percent=100,
        user_config=GatewaySettings().model_dump(mode="json"),
    )
    return deployment.bind(args.revision)


def _model(args: ModelArgs) -> serve.Application:
    model = args.model
    taken = model.engine.max_concurrent + model.engine.max_queued + MARGIN
    bundles = [dict(bundle) for bundle in model.bundles]
    deployment = serve.deployment(
        ServedReplica,
        name=REPLICA,
        num_replicas=model.replicas,
        ray_actor_options={"num_cpus": FRONT_CPUS},
        **(_together(bundles) if len(bundles) > 1 else {}),
        max_ongoing_requests=taken,
        max_queued_requests=taken,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=model.drain_s + 5.0,
    )
    return deployment.bind(model.model_dump(mode="json"), args.revision)


def _together(bundles: list[dict[str, float]]) -> dict[str, Any]:
    """Return what keeps a replica's ranks on its node: they talk over a local socket."""
    return {"placement_group_bundles": bundles, "placement_group_strategy": "STRICT_PACK"}
