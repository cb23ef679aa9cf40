"""Which numbers of ranks a model divides among, and what is said of the others."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import msgpack
import pytest

from cluster.errors import ConfigError
from serve_apps.engine.partition import check_directory, check_divides
from serve_apps.engine.plan import Row, StepPlan

SMOLLM2 = {
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
}


@pytest.mark.parametrize(
    ("config", "ranks", "told"),
    [
        (SMOLLM2, 2, "num_attention_heads=9 and num_key_value_heads=3 of m; use 1 or 3"),
        (SMOLLM2 | {"intermediate_size": 1535}, 3, "intermediate_size=1535 of m; use 1"),
        (SMOLLM2 | {"vocab_size": 49153}, 3, "vocab_size=49153 of m; use 1"),
        ({"num_attention_heads": 8, "num_key_value_heads": 4}, 8, "use 1, 2 or 4"),
    ],
)
def test_what_does_not_divide_is_told_with_what_would(
    config: dict[str, Any], ranks: int, told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_divides(config, ranks, "m")
    assert str(caught.value).endswith(told)
    assert f"tensor_parallel={ranks}" in str(caught.value)


@pytest.mark.parametrize("ranks", [1, 3])
def test_smollm2_divides_by_one_and_three(ranks: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    check_directory(tmp_path, ranks, "m")


def test_a_text_model_inside_another_is_found() -> None:
    with pytest.raises(ConfigError, match="use 1 or 3"):
        check_divides({"text_config": SMOLLM2}, 2, "m")


def test_a_plan_survives_the_wire() -> None:
    rows = (Row(array("i", [3, 70_000]), 17, [9], 1), Row(array("i", [0]), 0, [1, 2, 3], 0))
    plan = StepPlan(7, "m@3", rows)
    assert StepPlan.unpack(msgpack.unpackb(msgpack.packb(plan.pack()))) == plan


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["BertModel"]},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
    ],
)
def test_what_does_not_generate_by_itself_is_refused(
    config: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"m@2 is a {config['architectures'][0]}, which the eng"):
        check_directory(tmp_path, 1, "m@2")


@pytest.mark.parametrize("named", [["LlamaForCausalLM"], ["GPT2LMHeadModel"], None])
def test_decoders_are_served(named: list[str] | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": named}))
    check_directory(tmp_path, 1, "m@2")
