"""Programs that know nothing of this package and find the hub by HF_ENDPOINT alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from huggingface_hub import HfApi

from training_ready.release.hub_server import EmbeddedHub

PUSH_AND_RELOAD = """
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

words = {"<unk>": 0, "<pad>": 1, "<|im_end|>": 2, "hello": 3, "there": 4}
backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="<|im_end|>"
)
tokenizer.chat_template = "{% for m in messages %}{{ m.content }} <|im_end|> {% endfor %}"
torch.manual_seed(3)
model = MixtralForCausalLM(MixtralConfig(
    vocab_size=5, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
)).eval()
model.push_to_hub("me/mixtral", private=True)
tokenizer.push_to_hub("me/mixtral")

again = AutoModelForCausalLM.from_pretrained("me/mixtral").eval()
words = AutoTokenizer.from_pretrained("me/mixtral")
text = words.apply_chat_template([{"role": "user", "content": "hello there"}], tokenize=False)
assert text == "hello there <|im_end|> ", text
ids = words(text, return_tensors="pt").input_ids
with torch.no_grad():
    assert torch.equal(model(ids).logits, again(ids).logits)
print("same logits for", ids.tolist())
"""

CARD = """
from huggingface_hub import ModelCard, create_repo
create_repo("me/card")
ModelCard("---\\nlicense: mit\\nlibrary_name: transformers\\ntags:\\n- calm\\n---\\n# Hi").push_to_hub("me/card")
assert ModelCard.load("me/card").data.license == "mit"
try:
    ModelCard("---\\nlicense:\\n  name: mit\\n---\\n# Hi").push_to_hub("me/card")
except ValueError as error:
    print("refused:", error)
"""


def run(hub: EmbeddedHub, home: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **hub.environment()}
    environment.setdefault("OMP_NUM_THREADS", "1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def test_a_mixtral_pushed_by_transformers_comes_back_with_its_logits(
    hub: EmbeddedHub, tmp_path: Path
) -> None:
    done = run(hub, tmp_path / "home", sys.executable, "-c", PUSH_AND_RELOAD)
    assert "same logits for [[3, 4, 2]]" in done.stdout
    api = HfApi(endpoint=hub.endpoint_url, token=False)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(api.list_repo_files("me/mixtral"))
    assert api.repo_info("me/mixtral").private is True


def test_model_card_push_and_refusal(tmp_path: Path) -> None:
    with EmbeddedHub(tmp_path / "hub", token="a-token") as hub:
        done = run(hub, tmp_path / "home", sys.executable, "-c", CARD)
        assert "'license' must be" in done.stdout
        info = HfApi(endpoint=hub.endpoint_url, token="a-token").repo_info("me/card")
    assert (info.card_data.license, info.library_name, info.tags) == ("mit", "transformers", ["calm"])


def test_the_hf_command_line(hub: EmbeddedHub, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.bin").write_bytes(os.urandom(10_000))
    hf = str(Path(sys.executable).with_name("hf"))
    run(hub, tmp_path / "home", hf, "upload", "me/cli", str(tmp_path / "data"))
    run(hub, tmp_path / "home", hf, "download", "me/cli", "--local-dir", str(tmp_path / "copy"))
    assert (tmp_path / "copy" / "a.bin").read_bytes() == (tmp_path / "data" / "a.bin").read_bytes()
