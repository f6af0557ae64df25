from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from typer.testing import CliRunner

from training_ready.cli import app
from training_ready.moe.families import MoEError, routed_layers
from training_ready.moe.shared_base import build_shared_base, shared_base_adapters, train_shared_base
from training_ready.moe.shared_base_files import load_shared_base, save_shared_base
from training_ready.moe.upcycle import UpcyclePlan, upcycle
from training_ready.moe.upcycle_branches import Branch, parse_branch
from training_ready.moe.upcycle_export import export_upcycled
from training_ready.moe.upcycle_means import DomainMeans, streamed_means
from training_ready.moe.upcycle_target import target_config

from . import dense_models

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 54_321.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHAPE = {**dense_models.SHAPE, "eos_token_id": 2, "max_position_embeddings": 128}
BASES = {
    "mistral": MistralConfig(**{**SHAPE, "sliding_window": 6}),
    "llama": LlamaConfig(**{**SHAPE, "rope_parameters": LLAMA3_ROPE}),
    "llama-tied": LlamaConfig(**{**SHAPE, "tie_word_embeddings": True}),
    "qwen3": Qwen3Config(**SHAPE),
    "qwen3-bias": Qwen3Config(**{**SHAPE, "attention_bias": True}),
}
DOMAINS = ("psychology", "mental_health", "bias_detection", "general_therapeutic")


def write_base(folder: Path, config=BASES["mistral"], *, shards: str = "20KB", dtype=torch.float32) -> Path:
    dense_models.random_model(config).to(dtype).save_pretrained(folder, max_shard_size=shards)
    return folder


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def largest_difference(a, b):
    return float((a - b).abs().max())


def write_adapter(base: Path, folder: Path, *, seed: int, **changes) -> Path:
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["gate_proj", "up_proj", "down_proj"], **changes}
    model = get_peft_model(load(base), LoraConfig(**settings, init_lora_weights=False))
    model.save_pretrained(folder)
    return folder


def write_checkpoint_branch(base: Path, folder: Path, *, seed: int, part: str = ".mlp.") -> Path:
    model = load(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder, max_shard_size="50KB")
    return folder


def anchors(base: Path, **changes) -> UpcyclePlan:
    branches = [Branch(domain=domain, source=None) for domain in DOMAINS]
    return UpcyclePlan(
        **{"base": base, "branches": branches, "texts": None, "shard_bytes": 60_000, **changes}
    )


@pytest.mark.parametrize("name", sorted(BASES))
def test_the_function_is_preserved_at_every_boundary(name, token_ids, tmp_path):
    base = write_base(tmp_path / "base", BASES[name])
    expected = logits(load(base), token_ids)
    upcycle(anchors(base, top_k=3), tmp_path / "work")
    mixed = load_shared_base(load(base), tmp_path / "work" / "4-mix")
    assert largest_difference(logits(mixed, token_ids), expected) <= 1e-5
    out = tmp_path / "work" / "5-export"
    assert len(list(out.glob("model-*.safetensors"))) > 3
    model, report = AutoModelForCausalLM.from_pretrained(
        out, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert largest_difference(logits(model.eval(), token_ids), expected) <= 1e-5
    assert type(model).__name__ == ("Qwen3MoeForCausalLM" if "qwen3" in name else "MixtralForCausalLM")
    source = AutoConfig.from_pretrained(base)
    for key in ("rms_norm_eps", "head_dim", "rope_parameters", "tie_word_embeddings", "eos_token_id"):
        assert getattr(model.config, key) == getattr(source, key), key
    experts = routed_layers(model)[1].block.experts
    assert all(torch.equal(experts.down_proj[0], experts.down_proj[e]) for e in range(4))


def test_an_expert_is_its_adapter_branch(token_ids, tmp_path):
    """Experts that are all the same branch give that branch's logits, whatever the routers say."""
    base = write_base(tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter", seed=1)
    from peft import PeftModel

    branch = PeftModel.from_pretrained(load(base), adapter).eval()
    expected = logits(branch, token_ids)
    assert largest_difference(expected, logits(load(base), token_ids)) > 0.1
    plan = anchors(base, branches=[Branch(domain=domain, source=adapter) for domain in DOMAINS])
    upcycle(plan, tmp_path / "work")
    mixed = load_shared_base(load(base), tmp_path / "work" / "4-mix")
    assert largest_difference(logits(mixed, token_ids), expected) <= 1e-5
    assert largest_difference(logits(load(tmp_path / "work" / "5-export"), token_ids), expected) <= 1e-5


@pytest.mark.parametrize("kind", ["adapter", "checkpoint"])
def test_each_expert_is_its_own_branch(kind, tmp_path):
    base = write_base(tmp_path / "base")
    branches, expected = [], []
    for seed, domain in enumerate(DOMAINS[:3]):
        folder = tmp_path / domain
        if kind == "adapter":  # ranks and scalings differ from branch to branch
            write_adapter(base, folder, seed=seed, r=3 + seed, use_rslora=seed == 1)
            from peft import PeftModel

            trained = PeftModel.from_pretrained(load(base), folder).merge_and_unload()
        else:
            trained = load(write_checkpoint_branch(base, folder, seed=seed))
        branches.append(Branch(domain=domain, source=folder))
        expected.append(trained.model.layers[1].mlp)
    branches.append(Branch(domain="general", source=None))
    expected.append(load(base).model.layers[1].mlp)
    upcycle(anchors(base, branches=branches, rank=2), tmp_path / "work")
    experts = routed_layers(load(tmp_path / "work" / "5-export"))[1].block.experts
    for expert, dense in enumerate(expected):
        fused = torch.cat([dense.gate_proj.weight, dense.up_proj.weight])
        assert largest_difference(experts.gate_up_proj[expert], fused) <= 1e-6
        assert largest_difference(experts.down_proj[expert], dense.down_proj.weight) <= 1e-6
    mix = tmp_path / "work" / "4-mix"
    if kind == "adapter":
        model = load_shared_base(load(base), mix)
        assert {adapter.rank for _, _, adapter in shared_base_adapters(model)} == {5}
    else:
        with pytest.raises(MoEError, match="train the exported mixture instead"):
            load_shared_base(load(base), mix)
        with pytest.raises(MoEError, match="their checkpoints are needed"):
            export_upcycled(base, mix, tmp_path / "out")


def test_joint_training_starts_from_mix_and_ends_in_a_plain_checkpoint(token_ids, tmp_path):
    base = write_base(tmp_path / "base")
    upcycle(anchors(base, rank=4), tmp_path / "work", until="mix")
    assert not (tmp_path / "work" / "5-export").exists()
    model = load_shared_base(load(base), tmp_path / "work" / "4-mix").train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        optimiser.zero_grad()
        model(input_ids=token_ids, labels=token_ids).loss.backward()
        optimiser.step()
    expected = logits(model.eval(), token_ids)
    save_shared_base(model, tmp_path / "trained", experts=DOMAINS)
    result = CliRunner().invoke(
        app,
        ["moe", "export", str(tmp_path / "trained"), "--base", str(base), "--out", str(tmp_path / "out")],
    )
    assert result.exit_code == 0, result.output
    assert largest_difference(logits(load(tmp_path / "out"), token_ids), expected) <= 1e-5
    assert largest_difference(expected, logits(load(base), token_ids)) > 0.01


def attention_trained(base: Path, folder: Path, **changes):
    """A mixture over the base with LoRA on its attention, saved as joint training saves it."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"], **changes}
    mixture = build_shared_base(load(base), experts=4, top_k=2, rank=4, alpha=8.0)
    model = get_peft_model(mixture, LoraConfig(**settings, init_lora_weights=False)).eval()
    train_shared_base(model)
    model.save_pretrained(folder)
    save_shared_base(model, folder, experts=DOMAINS)
    return model


@pytest.mark.parametrize("name", ["mistral", "llama-tied", "qwen3-bias"])
def test_lora_on_the_attention_leaves_in_the_weights(name, token_ids, tmp_path):
    base = write_base(tmp_path / "base", BASES[name])
    expected = logits(attention_trained(base, tmp_path / "state", use_rslora=True), token_ids)
    assert largest_difference(expected, logits(load(base), token_ids)) > 0.01
    export_upcycled(base, tmp_path / "state", tmp_path / "out", shard_bytes=60_000)
    assert largest_difference(logits(load(tmp_path / "out"), token_ids), expected) <= 1e-5


def test_lora_on_the_attention_is_summed_in_fp32_and_rounded_once(tmp_path):
    base = write_base(tmp_path / "base", dtype=torch.bfloat16)
    model = attention_trained(base, tmp_path / "state")
    export_upcycled(base, tmp_path / "state", tmp_path / "out")
    stored, dense = load(tmp_path / "out").state_dict(), load(base).state_dict()
    layer = model.base_model.model.model.layers[1].self_attn.o_proj
    assert layer.lora_A["default"].weight.dtype == torch.float32
    difference = 2.0 * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    name = "model.layers.1.self_attn.o_proj.weight"
    exact = (dense[name].double() + difference).float().bfloat16()
    assert stored[name].dtype == torch.bfloat16
    assert (stored[name] == exact).float().mean() > 0.999
    assert not torch.equal(exact, dense[name])
    assert torch.equal(*(weights[name.replace("o_proj", "v_proj")] for weights in (stored, dense)))


def test_lora_that_is_not_of_the_experts_is_refused(tmp_path):
    base = write_base(tmp_path / "base")
    state = tmp_path / "state"
    attention_trained(base, state)
    with pytest.raises(MoEError, match="4 projections of the attention were adapted as well"):
        load_shared_base(load(base), state)
    settings = json.loads((state / "shared_base.json").read_text())
    adapter = json.loads((state / "adapter_config.json").read_text())
    for file, changed, message in (
        ("shared_base.json", {**settings, "lora": []}, "in its files and not in shared_base.json"),
        (
            "shared_base.json",
            {**settings, "lora": [*settings["lora"], "x"]},
            "on x is in shared_base.json and",
        ),
        ("adapter_config.json", {**adapter, "use_dora": True}, "only a plain LoRA .* not use_dora"),
        ("adapter_config.json", {**adapter, "r": 8}, "r=8"),
    ):
        whole = (state / file).read_text()
        (state / file).write_text(json.dumps(changed))
        with pytest.raises(MoEError, match=message):
            export_upcycled(base, state, tmp_path / "out")
        (state / file).write_text(whole)
    wider = write_base(tmp_path / "wider", MistralConfig(**{**SHAPE, "num_attention_heads": 8}))
    with pytest.raises(MoEError, match=r"LoRA on model\.layers\.0\.self_attn\.o_proj is .*, the base needs"):
        export_upcycled(wider, state, tmp_path / "out")
    (state / "adapter_model.safetensors").unlink()
    with pytest.raises(MoEError, match="not a readable PEFT adapter"):
        export_upcycled(base, state, tmp_path / "out")


def test_what_is_shared_is_carried_bit_by_bit(tmp_path):
    base = write_base(tmp_path / "base", dtype=torch.bfloat16)
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 5], "pad_token_id": 0}')
    upcycle(anchors(base), tmp_path / "work")
    out = tmp_path / "work" / "5-export"

    def all_tensors(folder):
        return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}

    before, after = all_tensors(base), all_tensors(out)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    shared = [name for name in before if ".mlp." not in name]
    assert len(shared) == 3 + 2 * 6
    assert all(torch.equal(before[name], after[name]) for name in shared)
    assert torch.equal(
        after["model.layers.1.block_sparse_moe.experts.2.w3.weight"],
        before["model.layers.1.mlp.up_proj.weight"],
    )
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 5]
    assert AutoConfig.from_pretrained(out).dtype == torch.bfloat16


# ---- router rows


def write_tokenizer(folder: Path) -> None:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, 96)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} </s> {% endfor %}"
    fast.save_pretrained(folder)


def labelled(per_domain: int = 3):
    """Each domain draws its words from a quarter of the vocabulary; lengths differ."""
    generator = torch.Generator().manual_seed(1)
    return [
        (domain, torch.randint(3 + 23 * domain, 26 + 23 * domain, (8 + number,), generator=generator))
        for number in range(per_domain)
        for domain in range(4)
    ]


@pytest.mark.parametrize("name", ["mistral", "llama", "qwen3"])
def test_streamed_means_are_those_of_the_whole_model(name, tmp_path):
    config = MistralConfig(**{**SHAPE, "sliding_window": None}) if name == "mistral" else BASES[name]
    base = write_base(tmp_path / "base", config)
    texts = labelled()
    (tmp_path / "scratch").mkdir()
    streamed = streamed_means(base, texts, DOMAINS, scratch=tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []
    whole = DomainMeans(layers=2, domains=DOMAINS, hidden=48)
    model = load(base)
    longest = max(len(ids) for _, ids in texts)
    padded = torch.stack([torch.nn.functional.pad(ids, (0, longest - len(ids))) for _, ids in texts])
    mask = torch.stack([torch.arange(longest) < len(ids) for _, ids in texts])
    with whole.watching(model, torch.tensor([domain for domain, _ in texts]), mask), torch.no_grad():
        model(input_ids=padded, attention_mask=mask.long())
    assert torch.equal(streamed.tokens, whole.tokens)
    assert streamed.tokens[0].tolist() == [8 + 9 + 10] * 4
    assert torch.allclose(streamed.sums, whole.sums, atol=1e-4)
    rows = streamed.router_rows()
    assert rows.shape == (2, 4, 48)
    assert torch.allclose(rows.norm(dim=2), torch.ones(2, 4), atol=1e-6)
    means = whole.sums / whole.tokens[:, :, None]
    assert torch.allclose(
        torch.nn.functional.cosine_similarity(rows.double(), means - means.mean(dim=1, keepdim=True), dim=2),
        torch.ones(2, 4, dtype=torch.float64),
        atol=1e-6,
    )


def test_routers_from_texts_send_each_domain_to_its_expert(tmp_path):
    base = write_base(tmp_path / "base")
    write_tokenizer(base)
    texts = tmp_path / "texts.jsonl"
    with texts.open("w") as file:
        for domain, ids in labelled(6):
            words = " ".join(f"w{number}" for number in ids.tolist())
            row = {"text": words} if len(ids) % 2 else {"messages": [{"role": "user", "content": words}]}
            file.write(json.dumps({"domain": DOMAINS[domain], **row}) + "\n")
        file.write(json.dumps({"domain": "elsewhere", "text": "w3"}) + "\n")
    stages = upcycle(anchors(base, texts=texts, max_tokens=6), tmp_path / "work")
    assert stages[2].facts["tokens"] == dict.fromkeys(DOMAINS, 6 * 6)
    assert (tmp_path / "work" / "5-export" / "tokenizer.json").is_file()
    model = load(tmp_path / "work" / "5-export")
    router, chosen = routed_layers(model)[0].router, []
    router.register_forward_hook(lambda _, __, output: chosen.append(output[0].argmax(dim=-1)))
    fresh = torch.Generator().manual_seed(9)
    for domain in range(4):
        logits(model, torch.randint(3 + 23 * domain, 26 + 23 * domain, (1, 6), generator=fresh))
    own = torch.stack([(choice == domain).float().mean() for domain, choice in enumerate(chosen)])
    assert own.mean() > 0.5  # chance: 0.25

    texts.write_text('{"domain": "psychology", "text": "w3 w4"}\n{"domain": "psychology"}\n')
    with pytest.raises(MoEError, match=r"texts\.jsonl:2: needs 'domain' and 'text'"):
        upcycle(anchors(base, texts=texts), tmp_path / "other")
    texts.write_text('{"domain": "psychology", "text": "w3 w4"}\n')
    with pytest.raises(MoEError, match="no tokens of mental_health, bias_detection, general_therapeutic"):
        upcycle(anchors(base, texts=texts), tmp_path / "other")
    texts.write_text("".join(f'{{"domain": "{domain}", "text": "w3 w4"}}\n' for domain in DOMAINS))
    with pytest.raises(MoEError, match="do not tell them apart"):
        upcycle(anchors(base, texts=texts), tmp_path / "other")


# ---- refusals


@pytest.mark.parametrize(
    ("config", "top_k", "message"),
    [
        (LlamaConfig(**{**SHAPE, "attention_bias": True}), 2, "its attention has no biases"),
        (LlamaConfig(**{**SHAPE, "mlp_bias": True}), 2, "its experts have no biases"),
        (
            Qwen3Config(**{**SHAPE, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
            2,
            "one window for all layers or none",
        ),
        (Qwen2Config(), 2, "'qwen2' cannot be upcycled"),
        (BASES["mistral"], 1, "the router would get no gradient"),
        (BASES["qwen3"], 1, "the router would get no gradient"),
        (BASES["mistral"], 5, "top_k=5 of 4"),
    ],
)
def test_what_no_target_holds_is_refused(config, top_k, message):
    with pytest.raises(MoEError, match=message):
        target_config(config, experts=4, top_k=top_k)


def test_a_branch_that_moved_more_than_its_feed_forward_is_refused(tmp_path):
    base = write_base(tmp_path / "base")
    moved = write_checkpoint_branch(base, tmp_path / "moved", seed=1, part="layers.1.self_attn.v_proj")
    attention = write_adapter(base, tmp_path / "attention", seed=1, target_modules=["q_proj", "up_proj"])
    dora = write_adapter(base, tmp_path / "dora", seed=1, target_modules=["up_proj"])
    config = json.loads((dora / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    for source, message in (
        (moved, r"layers\.1\.self_attn\.v_proj\.weight differs from the anchor's"),
        (attention, r"self_attn\.q_proj is not a feed-forward projection"),
        (dora, "only a plain LoRA can be summed into weights, not use_dora"),
        (tmp_path / "nowhere", "can be read"),
    ):
        branches = [Branch(domain="a", source=source), Branch(domain="b", source=None)]
        with pytest.raises(MoEError, match=message):
            upcycle(anchors(base, branches=branches), tmp_path / "work")
        assert not (tmp_path / "work" / "2-branches").exists()
    same = [Branch(domain="a", source=None)] * 2
    with pytest.raises(MoEError, match="a domain of its own, not a, a"):
        upcycle(anchors(base, branches=same), tmp_path / "work")
    for text in ("psychology", "=x", "a b=x", "a="):
        with pytest.raises(MoEError, match="an expert is DOMAIN=PATH"):
            parse_branch(text)


def test_a_base_that_would_lose_a_tensor_is_refused(tmp_path):
    from safetensors.torch import save_file

    base = write_base(tmp_path / "base", shards="5GB")
    whole = load_file(base / "model.safetensors")
    extra = whole | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}
    save_file(extra, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MoEError, match=r"also holds model\.layers\.0\.self_attn\.q_norm\.weight"):
        upcycle(anchors(base), tmp_path / "work")
    del whole["model.norm.weight"]
    save_file(whole, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MoEError, match=r"lacks model\.norm\.weight"):
        upcycle(anchors(base), tmp_path / "work")


# ---- stages


def test_finished_stages_are_skipped_and_other_inputs_refused(tmp_path):
    base = write_base(tmp_path / "base")
    work = tmp_path / "work"
    first = upcycle(anchors(base), work, until="mix")
    assert not any(stage.skipped for stage in first)
    times = {path: path.stat().st_mtime_ns for path in work.rglob("*")}
    second = upcycle(anchors(base), work)
    assert [stage.skipped for stage in second] == [True] * 4 + [False]
    assert all(path.stat().st_mtime_ns == before for path, before in times.items() if path != work)
    with pytest.raises(MoEError, match=r"2-branches was made from other inputs \(rank differ\)"):
        upcycle(anchors(base, rank=8), work)
    with pytest.raises(MoEError, match=r"4-mix was made from other inputs \(top_k differ\)"):
        upcycle(anchors(base, top_k=3), work)
    (work / "3-router" / "router.safetensors").write_bytes(b"cut")
    with pytest.raises(MoEError, match="3-router to redo it"):
        upcycle(anchors(base), work)


def write_big_base(folder: Path, *, hidden: int, layers: int, shards: str) -> Path:
    config = MistralConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=hidden // 8,
        sliding_window=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size=shards)
    return folder


def command(base: Path, work: Path, *extra: str) -> list[str]:
    experts = [part for domain in DOMAINS for part in ("--expert", f"{domain}=anchor")]
    start = "from training_ready.cli import main; main()"
    return [sys.executable, "-c", start, "moe", "upcycle", str(base), "--work", str(work), *experts, *extra]


def test_killed_and_continued(tmp_path):
    base = write_big_base(tmp_path / "base", hidden=256, layers=8, shards="10MB")
    work = tmp_path / "work"
    arguments = command(base, work, "--shard-gb", "0.005", "--rank", "4")
    process = subprocess.Popen(arguments, env=os.environ, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(work.glob(".5-export.partial/*")):  # the first shard has begun
        assert process.poll() is None, "finished before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (work / "5-export").exists()
    inode = (work / "4-mix" / "manifest.json").stat().st_ino
    done = subprocess.run([*arguments, "--json"], check=True, capture_output=True, text=True)
    stages = json.loads(done.stdout)
    assert [stage["skipped"] for stage in stages] == [True] * 4 + [False]
    assert (work / "4-mix" / "manifest.json").stat().st_ino == inode
    assert not list(work.glob(".*"))
    ids = torch.randint(0, 4096, (1, 8), generator=torch.Generator().manual_seed(0))
    expected = logits(load(base), ids)
    assert largest_difference(logits(load(work / "5-export"), ids), expected) <= 1e-5


MEASURED = """
import json, re, sys
from pathlib import Path
from training_ready.cli import app

def status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def upcycle(base, work):
    app([*sys.argv[3:], str(base), "--work", str(work)], standalone_mode=False)

base, work = Path(sys.argv[1]), Path(sys.argv[2])
upcycle(base.with_name("tiny"), work.with_name("warm"))  # what is loaded lazily is no memory of the work
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
before = status("VmRSS")
upcycle(base, work)
print(json.dumps({"grown": status("VmHWM") - before}))
"""


def test_memory_stays_below_1_3_of_the_largest_shard_and_an_output_shard(tmp_path):
    write_base(tmp_path / "tiny")
    base = write_big_base(tmp_path / "base", hidden=512, layers=9, shards="30MB")
    work = tmp_path / "work"
    options = command(base, work, "--shard-gb", "0.06", "--rank", "2")
    arguments = [sys.executable, "-c", MEASURED, str(base), str(work), "moe", "upcycle", *options[8:]]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    grown = json.loads(done.stdout.splitlines()[-1])["grown"]
    read = [path.stat().st_size for path in base.glob("*.safetensors")]
    written = [path.stat().st_size for path in (work / "5-export").glob("*.safetensors")]
    assert len(read) >= 6
    assert sum(written) > 3 * sum(read)
    allowed = 1.3 * max(read) + max(written)
    assert grown <= allowed, f"{grown / 1e6:.0f} MB of {allowed / 1e6:.0f} MB"
    assert grown > max(written), "nothing was measured"
