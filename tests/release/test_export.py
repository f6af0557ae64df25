"""The exported folder loads as the model that was trained, for everyone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, snapshot_download
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from training_ready.release.build import build_release
from training_ready.release.commands import release_build
from training_ready.release.export import ExportError, end_of_turn_ids, load_checkpoint, write_release
from training_ready.release.facts import CardError
from training_ready.release.hub_server import EmbeddedHub
from training_ready.release.publish import publish_release

from .targets.conftest import byte_level_tokenizer

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
INPUTS = torch.randint(0, 40, (2, 30), generator=torch.Generator().manual_seed(5))


def tiny_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    vocabulary = ["<unk>", "<pad>", "<|im_end|>", "<|im_start|>", *(f"word{n}" for n in range(36))]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<|im_end|>", **special}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=["<|im_start|>", "<|im_end|>"], **tokens
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_model() -> MixtralForCausalLM:
    torch.manual_seed(11)
    config = MixtralConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
    )
    return MixtralForCausalLM(config).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(INPUTS).logits
    return result


def release_words() -> Any:
    return SimpleNamespace(
        license="mit", language=["en"], tags=[], summary="Tiny.", intended_use="Tests.", limits="Random."
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "release"
    return write_release(tiny_model(), tiny_tokenizer(), folder, end_of_turn_ids=[2, 3])


def test_the_weights_come_back_bit_for_bit(written: Path) -> None:
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(written).eval()), logits(tiny_model()))


def test_generation_settings_end_at_the_turn(written: Path) -> None:
    settings = GenerationConfig.from_pretrained(written)
    assert settings.eos_token_id == [2, 3]
    assert settings.pad_token_id == 1
    assert settings.bos_token_id is None


def test_the_chat_template_is_where_either_reader_looks(written: Path) -> None:
    assert (written / "chat_template.jinja").read_text() == CHATML
    assert json.loads((written / "tokenizer_config.json").read_text())["chat_template"] == CHATML
    assert AutoTokenizer.from_pretrained(written).chat_template == CHATML


def test_others_can_read_the_files_and_there_are_no_pickles(written: Path) -> None:
    assert {oct(path.stat().st_mode & 0o777) for path in written.iterdir()} == {"0o644"}
    assert oct(written.stat().st_mode & 0o777) == "0o755"
    assert {path.suffix for path in written.iterdir()} == {".json", ".safetensors", ".jinja"}
    assert list(written.parent.iterdir()) == [written]


def test_end_of_turn_comes_from_the_template() -> None:
    tokenizer = tiny_tokenizer(eos_token="<|im_start|>")
    assert end_of_turn_ids(tokenizer) == [2, 3]
    assert end_of_turn_ids(tiny_tokenizer(), "user") == [2]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n\n{% endfor %}"
    with pytest.raises(ExportError, match="special token"):
        end_of_turn_ids(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ExportError, match="no chat template"):
        end_of_turn_ids(tokenizer)


def test_padding_that_looks_like_the_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="padding token"):
        write_release(
            tiny_model(), tiny_tokenizer(pad_token="<|im_end|>"), tmp_path / "r", end_of_turn_ids=[2]
        )
    with pytest.raises(ExportError, match="below the vocabulary of 40"):
        write_release(tiny_model(), tiny_tokenizer(), tmp_path / "r", end_of_turn_ids=[40])
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_model_is_refused_and_leaves_the_old_release(tmp_path: Path) -> None:
    folder = write_release(tiny_model(), tiny_tokenizer(), tmp_path / "r", end_of_turn_ids=[2])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = tiny_model()
    model.lm_head.weight.data[3, 4] = float("nan")
    with pytest.raises(ExportError, match=r"lm_head\.weight holds values that are not finite"):
        write_release(model, tiny_tokenizer(), folder, end_of_turn_ids=[2])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_release_is_replaced_as_a_whole_and_nothing_else_is(tmp_path: Path) -> None:
    folder = write_release(tiny_model(), tiny_tokenizer(), tmp_path / "r", end_of_turn_ids=[2])
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    write_release(tiny_model(), tiny_tokenizer(), folder, end_of_turn_ids=[2])
    assert not (folder / "model-00001-of-00002.safetensors").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(ExportError, match="not an earlier release"):
        write_release(tiny_model(), tiny_tokenizer(), tmp_path / "home", end_of_turn_ids=[2])
    assert (tmp_path / "home" / "thesis.txt").exists()


# --- from a run


def checkpoint_of(run: Path, model: Any, tokenizer: Any) -> Path:
    checkpoint = run / "checkpoint-4321"
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    (checkpoint / "optimizer.pt").write_bytes(b"state")
    (checkpoint / "training_args.bin").write_bytes(b"pickle")
    return checkpoint


def test_a_run_becomes_a_release_on_the_hub_with_its_logits(
    hub: EmbeddedHub, api: HfApi, run_folder: Callable[[], Path], tmp_path: Path
) -> None:
    run = run_folder()
    checkpoint_of(run, tiny_model(), tiny_tokenizer())
    folder = tmp_path / "releases" / "tiny"
    files = build_release(run, folder, release_words())
    assert "optimizer.pt" not in {file.path for file in files}
    publication = publish_release(folder, "me/tiny", endpoint=hub.endpoint_url)
    copy = snapshot_download(
        "me/tiny", revision=publication.revision, endpoint=hub.endpoint_url, cache_dir=tmp_path / "cache"
    )
    model = AutoModelForCausalLM.from_pretrained(copy).eval()
    assert torch.equal(logits(model), logits(tiny_model()))
    assert model.generation_config.eos_token_id == [2]
    assert "`<|im_end|>` (id 2)" in (Path(copy) / "README.md").read_text()


def test_the_build_command_takes_its_words_from_the_runs_recipe(
    run_folder: Callable[[], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_folder()
    checkpoint_of(run, tiny_model(), tiny_tokenizer())
    (run / "recipe.yaml").write_text(
        "output_dir: runs/tiny-run\nmodel_name_or_path: org/tiny\ndata:\n  corpus: tiny/manifest.json\n"
        "release:\n  repo_id: me/tiny\n  license: mit\n  summary: A tiny one.\n  intended_use: Tests.\n"
    )
    with pytest.raises(CardError, match=r"release\.limits"):
        release_build(run, tmp_path / "r")
    release_build(run, tmp_path / "r", ["release.limits=Knows nothing at all."])
    assert "Knows nothing at all." in (tmp_path / "r" / "README.md").read_text()
    assert f"training-ready release publish {tmp_path / 'r'} me/tiny" in capsys.readouterr().out


def test_an_adapter_is_merged_into_its_base(
    summary: dict[str, Any], run_folder: Callable[[], Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    torch.manual_seed(2)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    checkpoint = checkpoint_of(run_folder(), model, tiny_tokenizer())
    merged, tokenizer = load_checkpoint(checkpoint)
    trained = logits(model.eval())
    assert (trained - logits(tiny_model())).abs().max() > 1e-3
    with pytest.raises(ExportError, match="adapter"):
        write_release(model, tokenizer, tmp_path / "r", end_of_turn_ids=[2])
    folder = write_release(merged, tokenizer, tmp_path / "r", end_of_turn_ids=[2])
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert (logits(loaded) - trained).abs().max() < 1e-5


def test_a_tokenizer_that_others_would_read_otherwise_is_refused(tmp_path: Path) -> None:
    """transformers takes every tokenizer beside a qwen2 configuration for Qwen's, which splits words its own way."""
    shape = {"vocab_size": 512, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = Qwen2Config(**shape, num_attention_heads=2, num_key_value_heads=2)
    checkpoint = checkpoint_of(tmp_path / "run", Qwen2ForCausalLM(config), byte_level_tokenizer())
    with pytest.raises(
        ExportError, match=r"qwen2 configuration as Qwen2Tokenizer, .* other tokens of \d+ in 98"
    ):
        load_checkpoint(checkpoint)
    with pytest.raises(ExportError, match="Qwen2Tokenizer"):
        write_release(
            Qwen2ForCausalLM(config), byte_level_tokenizer(), tmp_path / "release", end_of_turn_ids=[3]
        )
    assert not (tmp_path / "release").exists()

    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(
        checkpoint
    )  # what training on Qwen's would have saved
    model, tokenizer = load_checkpoint(checkpoint)
    folder = write_release(model, tokenizer, tmp_path / "release", end_of_turn_ids=[3])
    assert (folder / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()


def test_weights_that_transformers_would_make_up_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    checkpoint = checkpoint_of(tmp_path, model, tiny_tokenizer())
    model.model.layers[-1] = torch.nn.Identity()
    model.save_pretrained(checkpoint)
    with pytest.raises(ExportError, match=r"lacks \d+ tensors of its model: model\.layers"):
        load_checkpoint(checkpoint)
    (checkpoint / "pytorch_model_fsdp_0").mkdir()
    (checkpoint / "config.json").unlink()
    with pytest.raises(ExportError, match="an adapter in shards"):
        load_checkpoint(checkpoint)


_SAVE_IN_SHARDS = """
import sys
from types import SimpleNamespace
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import save_fsdp_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

PartialState(cpu=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
for part in (*model.model.layers, model):
    fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
save_fsdp_model(plugin, SimpleNamespace(process_index=dist.get_rank(), num_processes=2), model, sys.argv[2])
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_shards_of_two_ranks_are_joined_by_the_command_that_is_told(
    tmp_path: Path,
) -> None:
    """Under accelerate FSDP2 needs GPUs; its sharding and its way of saving do not."""
    checkpoint, script = checkpoint_of(tmp_path, tiny_model(), tiny_tokenizer()), tmp_path / "save.py"
    (checkpoint / "model.safetensors").rename(tmp_path / "model.safetensors")
    shutil.copyfile(checkpoint / "config.json", tmp_path / "config.json")
    script.write_text(_SAVE_IN_SHARDS)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    subprocess.run([sys.executable, *launcher, str(script), str(tmp_path), str(checkpoint)], check=True)
    with pytest.raises(ExportError, match="weights in shards") as refused:
        load_checkpoint(checkpoint)
    command = str(refused.value).splitlines()[-1].split()
    subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], check=True)
    model, _ = load_checkpoint(checkpoint)
    assert torch.equal(logits(model), logits(tiny_model()))


def test_what_can_be_refused_is_refused_before_weights_are_loaded(
    summary: dict[str, Any], run_folder: Callable[[], Path], tmp_path: Path
) -> None:
    with pytest.raises(CardError, match="checkpoint"):
        build_release(run_folder(), tmp_path / "r", release_words())
    words = release_words()
    words.limits = None
    with pytest.raises(CardError, match=r"release\.limits"):
        build_release(run_folder(), tmp_path / "r", words)
    assert not (tmp_path / "r").exists()
