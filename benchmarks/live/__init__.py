"""Live weights, measured: updates under load, and from a trainer's last step to an answer."""

from __future__ import annotations

from benchmarks.harness import Target

TARGETS = {
    "failed_requests": Target(at_most=0),
    "truncated_requests": Target(at_most=0),
    "mixed_requests": Target(at_most=0),
    "unexplained": Target(at_most=0),
    "gap_ms_above_p99": Target(at_most=250),
    "rss_growth_mib": Target(at_most=64),
    "store_growth_mib": Target(at_most=1),
    "leaked_cache_tokens": Target(at_most=0),
    "trainer_to_live_s_full": Target(at_most=3),
    "trainer_to_live_s_lora": Target(at_most=1),
    "pss_weights_4_replicas_vs_1": Target(at_most=1.05),
    "cold_start_vs_disk": Target(at_most=1),
}
