"""ray.serve.llm over vLLM's CPU build: run by the python of ``.bench/vllm``, ended by a signal.

It needs that environment alone; nothing of the product is imported.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading


def main() -> None:
    """Serve one model until TERM or INT."""
    parser = argparse.ArgumentParser()
    for name in ("model", "name", "dtype", "scratch"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("port", "max-model-len", "max-num-seqs"):
        parser.add_argument(f"--{name}", required=True, type=int)
    args = parser.parse_args()
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    # everything on loopback that lets itself be put there, and nothing told to anybody
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions
    from ray.serve.llm import LLMConfig, build_openai_app

    # more logical CPUs than cores: the proxy, the router and the replica mostly wait
    ray.init(
        num_cpus=8,
        include_dashboard=False,
        _temp_dir=args.scratch,
        _node_ip_address="127.0.0.1",
        logging_level="warning",
    )
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=args.port))
    config = LLMConfig(
        model_loading_config={"model_id": args.name, "model_source": args.model},
        accelerator_config={"kind": "cpu"},
        deployment_config={"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
        engine_kwargs={
            "dtype": args.dtype,
            "max_model_len": args.max_model_len,
            "max_num_seqs": args.max_num_seqs,
        },
        runtime_env={"env_vars": {k: v for k, v in os.environ.items() if _for_engine(k)}},
    )
    serve.run(build_openai_app({"llm_configs": [config]}), blocking=False)
    ended.wait()
    serve.shutdown()
    ray.shutdown()


def _for_engine(variable: str) -> bool:
    return variable.startswith(("VLLM_", "HF_", "TORCHINDUCTOR_", "TRITON_", "OMP_"))


if __name__ == "__main__":
    main()
