"""The file that ``ray up`` reads, rendered from a cluster configuration."""

from __future__ import annotations

import shlex
from typing import Any

import yaml

from cluster.head import EVERYWHERE
from cluster.manifests.schema import Aws, ClusterConfig, OnPremises, WorkerGroup

HEAD = "head"
ENV_FILE = "~/.roundhouse.env"
TOKEN = "~/.ray/auth_token"
CODE = "~/roundhouse"
PYTHON = "~/venv/bin/python"
SHIPPED = ("cluster", "serve_apps", "train_jobs", "configs", "pyproject.toml", "constraints.txt")
SHIPPED_TOO = ("README.md", "LICENSE")  # pyproject.toml names them
GPU_START_S = 1800
"""How long a job waits for machines that have yet to start."""


def token_file(config: ClusterConfig) -> str:
    """Return where this machine keeps the cluster's token: never inside the rendered file."""
    return f"~/.roundhouse/auth/{config.name}.token"


def render(config: ClusterConfig, source: str) -> str:
    """Return the YAML text; ``source`` is the configuration's own path, for the header."""
    text = yaml.safe_dump(ray_cluster(config), sort_keys=False, width=10_000)
    return _header(config, source) + text


def ray_cluster(config: ClusterConfig) -> dict[str, Any]:
    """Return what `ray up` reads, as data."""
    provider = config.provider
    machines = _aws(config, provider) if provider.kind == "aws" else _on_premises(provider)
    auth = {"ssh_user": config.ssh.user}
    if config.ssh.private_key:
        auth["ssh_private_key"] = config.ssh.private_key
    checkout = config.install.checkout.rstrip("/")
    mounts = {f"{CODE}/{name}": f"{checkout}/{name}" for name in (*SHIPPED, *SHIPPED_TOO)}
    return {
        "cluster_name": config.name,
        **machines,
        "auth": auth,
        "idle_timeout_minutes": config.idle_minutes,
        "file_mounts": {TOKEN: token_file(config), **mounts},
        "rsync_exclude": ["__pycache__", "*.egg-info"],
        "initialization_commands": [],
        "setup_commands": _setup(config),
        "head_setup_commands": [f"{PYTHON} -m pip install -q boto3"] if _is_aws(config) else [],
        "worker_setup_commands": [],
        "head_start_ray_commands": _start_head(config),
        "worker_start_ray_commands": _start_worker(config),
    }


def _aws(config: ClusterConfig, aws: Aws) -> dict[str, Any]:
    head = {
        "resources": {"CPU": aws.head.cpus, "GPU": 0},
        "min_workers": 0,
        "max_workers": 0,
        "node_config": _instance(aws, aws.head.instance, aws.head.disk_gb),
    }
    groups = {group.name: _group(aws, group) for group in aws.workers}
    return {
        "max_workers": sum(group.max for group in aws.workers),
        "upscaling_speed": 1.0,
        "provider": {
            "type": "aws",
            "region": aws.region,
            "availability_zone": ",".join(aws.zones),
            "cache_stopped_nodes": False,  # an idle machine is given back, disk and all
        },
        "head_node_type": HEAD,
        "available_node_types": {HEAD: head, **groups},
    }


def _group(aws: Aws, group: WorkerGroup) -> dict[str, Any]:
    market = {"InstanceMarketOptions": {"MarketType": "spot"}} if group.spot else {}
    return {
        "resources": {"CPU": group.cpus, "GPU": group.gpus},
        "min_workers": group.min,
        "max_workers": group.max,
        "node_config": _instance(aws, group.instance, group.disk_gb) | market,
    }


def _instance(aws: Aws, instance: str, disk_gb: int) -> dict[str, Any]:
    disk = {"VolumeSize": disk_gb, "VolumeType": "gp3", "Encrypted": True}
    found: dict[str, Any] = {
        "InstanceType": instance,
        "ImageId": aws.image,
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
        # no credentials of the machine for whoever can make a process fetch a URL
        "MetadataOptions": {"HttpTokens": "required"},
    }
    if aws.key_name:
        found["KeyName"] = aws.key_name
    if aws.security_groups:
        found["SecurityGroupIds"] = list(aws.security_groups)
    return found


def _on_premises(there: OnPremises) -> dict[str, Any]:
    # Ray knows one kind of node here and keeps all of them: it refuses node types for `local`
    return {
        "max_workers": len(there.workers),
        "provider": {
            "type": "local",
            "head_ip": there.head,
            "worker_ips": list(there.workers),
        },
    }


def _setup(config: ClusterConfig) -> list[str]:
    """Return what makes a machine ready, each step harmless when it is done already."""
    python, path = config.install.python, config.storage.path
    steps = []
    if _is_aws(config):
        packages = f"nfs-common {python} {python}-venv"
        steps.append(
            f"{python} -m ensurepip --version >/dev/null 2>&1 && command -v mount.nfs4 >/dev/null "
            f"|| (sudo apt-get update -q && sudo apt-get install -y -q {packages})"
        )
    if config.storage.nfs:
        options = "nfsvers=4.1,rsize=1048576,wsize=1048576,hard,timeo=600,retrans=2,noresvport"
        steps.append(
            f"mountpoint -q {path} || (sudo mkdir -p {path} && sudo mount -t nfs4 -o {options} "
            f"{config.storage.nfs} {path})"
        )
        steps.append(f'[ -w {path} ] || sudo chown "$(id -un)" {path}')
    return [
        *steps,
        _guard(config),
        f"[ -x {PYTHON} ] || {python} -m venv ~/venv",
        # from PyPI, torch for Linux is the CUDA build
        f"{PYTHON} -m pip install -q -c {CODE}/constraints.txt torch",
        f"DS_BUILD_OPS=0 {PYTHON} -m pip install -q -c {CODE}/constraints.txt -e {CODE}",
        _write_environment(config),
        f"grep -qxF '. {ENV_FILE}' ~/.bashrc || echo '. {ENV_FILE}' >> ~/.bashrc",
    ]


def _guard(config: ClusterConfig) -> str:
    path = config.storage.path
    return (
        f"mountpoint -q {path} && [ -w {path} ] || (echo 'error: {path} is not a mounted, "
        "writable folder here: every machine needs the shared folder of storage.path' >&2; "
        "exit 1)"
    )


def _write_environment(config: ClusterConfig) -> str:
    variables = {
        **EVERYWHERE,
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(GPU_START_S),
        "ROUNDHOUSE_HOME": config.storage.path,
        "DASHBOARD_METRIC_PORT": str(config.ports.dashboard_metrics),
        "AUTOSCALER_METRIC_PORT": str(config.ports.autoscaler_metrics),
    }
    lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    lines += [
        "unset OMP_NUM_THREADS",  # Ray's launcher sets it to 1, and every worker would inherit it
        'export RAY_AUTH_TOKEN_PATH="$HOME/.ray/auth_token"',
        'export PATH="$HOME/venv/bin:$PATH"',
    ]
    return f"printf '%s\\n' {' '.join(_quoted(line) for line in lines)} > {ENV_FILE}"


def _quoted(line: str) -> str:
    assert "'" not in line, "values are plain words: the schema says so"
    return f"'{line}'"


def _start_head(config: ClusterConfig) -> list[str]:
    ports, provider = config.ports, config.provider
    cpus = provider.head.cpus if provider.kind == "aws" else provider.head_cpus
    line = [
        "ray start --head",
        f"--port={ports.gcs}",
        *_node_options(config),
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={ports.dashboard}",
        f"--ray-client-server-port={ports.client}",
        f"--num-cpus={cpus}",
        "--num-gpus=0",
        '--autoscaling-config="$HOME/ray_bootstrap_config.yaml"',
    ]
    attach = (
        f"roundhouse attach --dashboard http://127.0.0.1:{ports.dashboard} "
        f"--serve http://127.0.0.1:{ports.serve} --token-file {TOKEN} "
        "--ray-cluster ~/ray_bootstrap_config.yaml"
    )
    return [_prepared("ray stop"), _guard(config), _prepared(" ".join(line)), _prepared(attach)]


def _start_worker(config: ClusterConfig) -> list[str]:
    line = [f"ray start --address=$RAY_HEAD_IP:{config.ports.gcs}", *_node_options(config)]
    return [_prepared("ray stop"), _guard(config), _prepared(" ".join(line))]


def _node_options(config: ClusterConfig) -> list[str]:
    ports = config.ports
    store = config.object_store_gb
    return [
        f"--object-manager-port={ports.object_manager}",
        f"--node-manager-port={ports.node_manager}",
        f"--min-worker-port={ports.workers_from}",
        f"--max-worker-port={ports.workers_to}",
        f"--dashboard-agent-listen-port={ports.agent}",
        f"--dashboard-agent-grpc-port={ports.agent_grpc}",
        f"--runtime-env-agent-port={ports.runtime_env}",
        f"--metrics-export-port={ports.metrics}",
        *([f"--object-store-memory={int(store * 1e9)}"] if store else []),
        "--disable-usage-stats",
    ]


def _prepared(command: str) -> str:
    """Return a command in our environment and an empty directory, its token readable by us only.

    Whatever starts Serve puts its directory first on the path of every replica.
    """
    return (
        f"chmod 700 ~/.ray && chmod 600 {TOKEN} && mkdir -p ~/empty && cd ~/empty && "
        f". {ENV_FILE} && {{ ulimit -n 65536 || true; }} && {command}"
    )


def _is_aws(config: ClusterConfig) -> bool:
    return config.provider.kind == "aws"


def _header(config: ClusterConfig, source: str) -> str:
    target = "ray_cluster.yaml" if _is_aws(config) else "configs/cluster/on-premises.ray.yaml"
    ports, user = config.ports, config.ssh.user
    metrics = f"{ports.metrics}, {ports.dashboard_metrics}, {ports.autoscaler_metrics}"
    tunnels = " ".join(f"-L {p}:127.0.0.1:{p}" for p in (ports.dashboard, ports.serve))
    return f"""\
# A Ray cluster for `ray up`, rendered from {source}. Change that, then
#   roundhouse config ray-cluster {source} --write {target}
# which also makes the token below, mode 0600, where there is none. Run `ray up {target}`
# from the root of the checkout; docs/cluster.md tells the way from there to a served model.
#
# Security. The token opens jobs, Serve's configuration and the dashboard: whoever holds it runs
# code on every machine. It travels by ssh and stands in no configuration. It does not protect
#   ports {metrics}: metrics, readable by whoever reaches them;
#   one random port of each Serve replica; the traffic among the machines, which is in clear.
# So let nobody but these machines reach any port but 22. The dashboard and the endpoint, which
# asks for an API key, listen on the head's loopback only; a tunnel reaches them:
#   ssh -N {tunnels} {user}@HEAD
"""
