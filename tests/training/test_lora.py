"""Names of layers either match some, or are refused in words at the start of a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from trl import ModelConfig

from training_ready.training.lora import lora_config
from training_ready.training.scratch import ModelError

from . import dense_base


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    config = AutoConfig.for_model("mistral", **dense_base.SHAPE, vocab_size=64, pad_token_id=0)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return made


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj"], r"write '.*\.q_proj'"),
        (["self_attn.q_proj"], r"write '.*\.self_attn\.q_proj'"),
        (["q_porj"], "q_porj matches no module of this model; did you mean `q_proj`"),
        (["Wqkv", "Wo"], "Wo, Wqkv matches no module of this model; correct the names"),
        (["*.q_proj"], "no regular expression (nothing to repeat at position 0)"),
    ],
)
def test_what_matches_nothing_is_refused(model: PreTrainedModel, targets: list[str], message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        lora_config(ModelConfig(use_peft=True, lora_target_modules=targets), model)


@pytest.mark.parametrize(
    "targets", [None, ["all-linear"], ["q_proj", "Wo"], [r".*\.q_proj"], [r".*\.self_attn\.q_proj"]]
)
def test_what_matches_is_left_as_it_is(model: PreTrainedModel, targets: list[str] | None) -> None:
    found = lora_config(ModelConfig(use_peft=True, lora_target_modules=targets), model)
    assert found is not None
    assert lora_config(ModelConfig(lora_target_modules=targets), model) is None


@pytest.mark.parametrize("moe", ["", "moe: {shared_base: {experts: 2, rank: 4, alpha: 8}}\n"])
def test_one_name_alone_ends_a_run_before_it_trains(
    run_here: Callable[..., Any], tmp_path: Path, moe: str
) -> None:
    base = dense_base.write_model(tmp_path / "base")
    text = f"output_dir: {tmp_path / 'run'}\nmodel_name_or_path: {base}\n{dense_base.RECIPE}{moe}use_peft: true\n"
    with pytest.raises(ModelError, match=re.escape(r"write '.*\.o_proj'")):
        run_here(text, "lora_target_modules=[o_proj]")
