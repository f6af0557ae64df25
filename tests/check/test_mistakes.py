"""One realistic mistake per recipe: each is refused by the right probe, at the right key and line, without a weight.

The model folders hold no weights, so a recipe that is refused here was refused before any was loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig

from training_ready.check.run import PROBES, Report
from training_ready.release.connection import hub_api
from training_ready.release.hub_server import EmbeddedHub

from .right_recipes import FULL, LORA, MOE, SCRATCH, Keys

Check = Callable[..., Report]


def corpus(name: str, **more: str) -> Keys:
    rest = "".join(f", {key}: {value}" for key, value in more.items())
    return {"data": f"{{corpus: final_dataset/{name}/manifest.json{rest}}}"}


SPREAD = "model_init_kwargs.distributed_config"


def spread(sizes: str) -> Keys:
    return {
        "model_init_kwargs": f"{{distributed_config: {{{sizes}}}}}",
        "save_only_model": "true",
        "launch": "{accelerate_config: ddp, num_processes: 4}",
    }


HUGE: Keys = {
    "model": "{config: {model_type: llama, hidden_size: 65536, num_hidden_layers: 100, num_attention_heads: 512, "
    "max_position_embeddings: 512}, tokenizer: {vocab_size: 600}}",
    "max_steps": "2000",
}
NO_EVAL: Keys = {"eval_strategy": None, "eval_steps": None}

# (probe, base, what is changed, the key at fault, a word of the message)
MISTAKES: list[tuple[str, Keys, Keys, str, str]] = [
    # ---------------------------------------------------------------- keys
    ("keys", LORA, {"learning_rte": "2.0e-4"}, "learning_rte", "did you mean `learning_rate`"),
    ("keys", LORA, {"max_seq_length": "4096"}, "max_seq_length", "max_length"),
    ("keys", LORA, {"warmup_ratio": "0.1"}, "warmup_ratio", "warmup_steps"),
    ("keys", LORA, {"lr_scheduler_type": "cosin"}, "lr_scheduler_type", "cosine"),
    ("keys", LORA, {"gradient_accumulation_steps": "0"}, "gradient_accumulation_steps", "0"),
    ("keys", LORA, {"push_to_hub": "true"}, "push_to_hub", "release publish"),
    ("keys", LORA, {"assistant_only_loss": "true"}, "assistant_only_loss", "target_role"),
    ("keys", LORA, {"auto_find_batch_size": "true"}, "auto_find_batch_size", "order"),
    ("keys", SCRATCH, {"dataloader_num_workers": "4"}, "dataloader_num_workers", "stream"),
    # -------------------------------------------------------------- versions
    ("versions", SCRATCH, {"report_to": "swanlab"}, "report_to", "swanlab"),
    (
        "versions",
        SCRATCH,
        {"optim": "galore_adamw", "optim_target_modules": "[q_proj]"},
        "optim",
        "galore-torch",
    ),
    ("versions", SCRATCH, {"optim": "schedule_free_adamw"}, "optim", "schedulefree"),
    # ---------------------------------------------------------------- bucket
    ("bucket", LORA, corpus("cals", eval_split="val"), "data.corpus", "final_dataset/cals"),
    ("bucket", LORA, corpus("lost") | NO_EVAL, "data.corpus", "shard-00000"),
    ("bucket", LORA, corpus("changed") | NO_EVAL, "data.corpus", "was changed after the build"),
    (
        "bucket",
        LORA,
        {"stream": "{mixture: {a: {}, b: {corpus: final_dataset/gone/manifest.json}}}"},
        "stream.mixture",
        "final_dataset/gone",
    ),
    (
        "bucket",
        LORA,
        {"checkpoint": "{mirror: 's3://no-such-bucket-of-ours/runs'}"},
        "checkpoint.mirror",
        "no-such-bucket-of-ours",
    ),
    # ------------------------------------------------------------------ data
    (
        "data",
        LORA,
        corpus("calls", train_split="trian") | NO_EVAL,
        "data.train_split",
        "has no split 'trian'",
    ),
    ("data", LORA, corpus("calls", eval_split="valid"), "data.eval_split", "has no split 'valid'"),
    ("data", LORA, corpus("clients") | NO_EVAL, "data.target_role", "whose target is 'user'"),
    ("data", LORA, corpus("mixed") | NO_EVAL, "data.target_role", "1 whose target is 'user'"),
    ("data", LORA, corpus("twice", eval_split="val"), "data.corpus", "is there 2 times"),
    ("data", LORA, corpus("empty_turn") | NO_EVAL, "data.corpus", "an empty turn"),
    ("data", LORA, corpus("unlicensed") | NO_EVAL, "data.corpus", "license_tag"),
    ("data", LORA, corpus("all_unlicensed") | NO_EVAL, "data.corpus", "license_tag"),
    ("data", LORA, corpus("long", eval_split="val"), "max_length", "beyond max_length 256"),
    ("data", LORA, {"max_length": "48"}, "max_length", "beyond max_length 48"),
    ("data", LORA, {"stream": "{overlong: error}", "max_length": "64"}, "stream.overlong", "stops the run"),
    ("data", LORA, corpus("calls", stages="[stage3_edge_stress_test]") | NO_EVAL, "data.stages", "stage3"),
    (
        "data",
        LORA,
        {"stream": "{mixture: {a: {sources: [letters]}}}"},
        "stream.mixture.a",
        "no record of the corpus is of the source letters",
    ),
    # -------------------------------------------------------------- template
    (
        "template",
        LORA,
        {"model_name_or_path": "MODELS/dense-no-template"},
        "model_name_or_path",
        "no chat template",
    ),
    (
        "template",
        LORA,
        {"model_name_or_path": "MODELS/dense-no_end"},
        "model_name_or_path",
        "never learn to stop",
    ),
    ("template", LORA, {"model_name_or_path": "MODELS/dense-forgets"}, "model_name_or_path", "earlier turns"),
    (
        "template",
        LORA,
        {"model_name_or_path": "MODELS/dense-thinks"},
        "model_name_or_path",
        "training went on",
    ),
    (
        "template",
        LORA,
        {"model_name_or_path": "MODELS/dense-pad-is-end"},
        "model_name_or_path",
        "padding token",
    ),
    ("template", LORA, {"model_name_or_path": "MODELS/dense-no-pad"}, "model_name_or_path", "padding"),
    (
        "template",
        LORA,
        {"model_name_or_path": "MODELS/dense-no_system", **corpus("system"), **NO_EVAL},
        "model_name_or_path",
        "no system turn",
    ),
    (
        "template",
        LORA,
        {"model_name_or_path": "MODELS/narrow"},
        "model_name_or_path",
        "no row in the embedding",
    ),
    ("template", LORA, {"pad_token": "'<|im_end|>'"}, "pad_token", "padding token"),
    ("template", LORA, {"eos_token": "'<|endoftext|>'"}, "eos_token", "ends a turn with"),
    (
        "template",
        LORA,
        {"chat_template_path": "TEMPLATES/no_end.jinja"},
        "chat_template_path",
        "never learn to stop",
    ),
    (
        "template",
        LORA,
        {"chat_template_path": "TEMPLATES/tabs.jinja", "release": "{target: tgi}"},
        "chat_template_path",
        "no method named expandtabs",
    ),
    (
        "template",
        LORA,
        {"chat_template_path": "TEMPLATES/signs.jinja", "release": "{target: tgi}"},
        "chat_template_path",
        "TGI's template engine renders",
    ),
    (
        "template",
        SCRATCH,
        {
            "model": "{config: {model_type: qwen2, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
            "num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 512}, "
            "tokenizer: {vocab_size: 600}}"
        },
        "model.config.model_type",
        "qwen2 configuration as Qwen2Tokenizer",
    ),
    # ------------------------------------------------------------- loss mask
    ("loss_mask", LORA, corpus("monologue") | NO_EVAL, "data.target_role", "cannot be learned from"),
    ("loss_mask", LORA, {"chat_template_path": "TEMPLATES/shouts.jinja"}, "chat_template_path", "learned is"),
    ("loss_mask", LORA, {"max_length": "16"}, "max_length", "no learned token within max_length 16"),
    # ------------------------------------------------------------ parameters
    (
        "parameters",
        LORA,
        {"model_name_or_path": "MODELS/not-a-model"},
        "model_name_or_path",
        "no configuration",
    ),
    (
        "parameters",
        LORA,
        {"model_name_or_path": "MODELS/short"},
        "max_length",
        "max_length 256 > the model's 128",
    ),
    ("parameters", LORA, {"lora_target_modules": "[Wqkv]"}, "lora_target_modules", "Wqkv"),
    ("parameters", LORA, {"lora_target_modules": "[v_porj]"}, "lora_target_modules", "did you mean `v_proj`"),
    ("parameters", LORA, {"lora_target_modules": "[q_proj]"}, "lora_target_modules", r"write '.*\.q_proj'"),
    (
        "parameters",
        LORA,
        {"lora_target_modules": "['*.q_proj']"},
        "lora_target_modules",
        "no regular expression",
    ),
    (
        "parameters",
        LORA,
        {"lora_target_modules": "[q_proj, v_porj]"},
        "lora_target_modules",
        "'v_porj' matches nothing",
    ),
    (
        "parameters",
        LORA,
        {"lora_modules_to_save": "[score]"},
        "lora_modules_to_save",
        "'score' matches nothing",
    ),
    (
        "parameters",
        MOE,
        {"lora_target_modules": "[q_proj, v_proj, gate_proj, up_proj, down_proj]"},
        "lora_target_modules",
        "would name the experts",
    ),
    (
        "parameters",
        MOE,
        {"lora_target_modules": "all-linear"},
        "lora_target_modules",
        "routers would be adapted",
    ),
    (
        "parameters",
        MOE,
        {"lora_target_modules": "all-linear", "lora_dropout": "0.05"},
        "lora_dropout",
        "lora_dropout",
    ),
    (
        "parameters",
        MOE,
        {"lora_target_parameters": "[experts.gate_up, mlp.experts.down_proj]"},
        "lora_target_parameters",
        "'experts.gate_up' matches nothing",
    ),
    (
        "parameters",
        SCRATCH,
        {"model": str(SCRATCH["model"]).replace("num_experts_per_tok: 2", "num_experts_per_tok: 8")},
        "model.config.num_experts_per_tok",
        "8 of 4 experts",
    ),
    (
        "parameters",
        SCRATCH,
        {"model": str(SCRATCH["model"]).replace("model_type: mixtral", "model_type: mixtrall")},
        "model.config",
        "did you mean `mixtral`",
    ),
    (
        "parameters",
        SCRATCH,
        {"model": str(SCRATCH["model"]).replace("num_local_experts", "num_expert")},
        "model.config",
        "has no num_expert",
    ),
    ("parameters", FULL, {"moe": "{adapters: {rank: 12, alpha: 16}}"}, "moe.adapters.rank", "12 = 1 x 8 + 4"),
    # -------------------------------------------------------------- topology
    ("topology", LORA, {"launch": "{accelerate_config: fsdp3}"}, "launch.accelerate_config", "fsdp2"),
    ("topology", SCRATCH, {"launch": "{accelerate_config: fsdp2}"}, "use_cpu", "plain data parallelism"),
    ("topology", SCRATCH, {"launch": "{accelerate_config: single_gpu}"}, "use_cpu", "paid and idle"),
    (
        "topology",
        SCRATCH,
        {"launch": "{accelerate_config: cpu, num_processes: 2}"},
        "launch.num_processes",
        "one process",
    ),
    ("topology", LORA, {"launch": "{accelerate_config: cpu}"}, "launch.accelerate_config", "use_cpu: true"),
    ("topology", SCRATCH, {"attn_implementation": "flash_attention_2"}, "attn_implementation", "GPUs only"),
    ("topology", LORA, {"dtype": "float32", "bf16": "false"}, "attn_implementation", "bf16 or fp16"),
    ("topology", LORA, {"bf16": "false", "fp16": "true"}, "fp16", "mixed_precision bf16"),
    ("topology", MOE, {"bf16": "false", "fp16": "true"}, "bf16", "DeepSpeed has bf16 true"),
    ("topology", LORA, {"save_only_model": "true"}, "save_only_model", "cannot be continued"),
    ("topology", LORA, {"deepspeed": "deepspeed_configs/zero2.json"}, "deepspeed", "take `deepspeed` out"),
    (
        "topology",
        LORA,
        {"launch": "{accelerate_config: TOPOLOGIES/tensor.yaml}"},
        "launch.accelerate_config",
        "tp_size 2",
    ),
    (
        "topology",
        LORA,
        {"launch": "{accelerate_config: TOPOLOGIES/numbers.yaml}"},
        "gradient_accumulation_steps",
        "gradient_accumulation_steps 8",
    ),
    (
        "topology",
        LORA,
        {"launch": "{accelerate_config: TOPOLOGIES/twice.yaml}"},
        "activation_checkpointing",
        "refuses",
    ),
    (
        "topology",
        LORA,
        {"launch": "{accelerate_config: TOPOLOGIES/lost.yaml}"},
        "launch.accelerate_config",
        "not there",
    ),
    (
        "topology",
        MOE,
        {"launch": "{accelerate_config: zero3, num_processes: 4}"},
        "launch.accelerate_config",
        "for ever",
    ),
    (
        "topology",
        MOE,
        {"model_name_or_path": "MODELS/qwen_moe"},
        "launch.accelerate_config",
        "MixtralSparseMoeBlock",
    ),
    ("topology", MOE, {"load_in_4bit": "true"}, "load_in_4bit", "leaves fused experts"),
    (
        "topology",
        MOE,
        {"moe": "{adapters: {rank: 8, alpha: 32}}", "lora_alpha": "32"},
        "moe.adapters",
        "zero3",
    ),
    ("topology", MOE, {"router_aux_loss_coef": "0.01"}, "router_aux_loss_coef", "routers are frozen"),
    (
        "topology",
        MOE,
        {"lora_target_parameters": "[mlp.experts.gate_up_proj, mlp.experts.down_proj]"},
        "lora_target_parameters",
        "zero3",
    ),
    ("topology", LORA, {"router_aux_loss_coef": "0.01"}, "router_aux_loss_coef", "dense"),
    (
        "topology",
        LORA,
        {"moe": "{adapters: {rank: 8, alpha: 32}}", "lora_alpha": "32"},
        "moe.adapters",
        "dense",
    ),
    ("topology", FULL, {"model_name_or_path": "MODELS/top1"}, "model_name_or_path", "no gradient"),
    (
        "topology",
        FULL,
        {"activation_checkpointing_kwargs": "{use_reentrant: true}"},
        "activation_checkpointing_kwargs",
        "re-entrant",
    ),
    (
        "topology",
        MOE,
        {"activation_checkpointing_kwargs": "{selective: true}"},
        "activation_checkpointing_kwargs",
        "not re-entrant",
    ),
    ("topology", LORA, {"model_name_or_path": "MODELS/recurrent"}, "packing", "carry a state"),
    ("topology", LORA, {"stream": "{lanes: 4}"}, "stream.lanes", "must divide"),
    ("topology", FULL, spread("fsdp_size: 4, ep_sise: 2"), "model_init_kwargs", "unexpected keyword"),
    ("topology", FULL, spread("fsdp_size: 4, ep_size: 3"), "model_init_kwargs", "must divide"),
    ("topology", FULL, spread("fsdp_size: 2, ep_size: 2"), "model_init_kwargs", "2 ranks, but 4 run"),
    ("topology", FULL, spread("tp_size: 4"), "model_init_kwargs", "share their packs"),
    (
        "topology",
        FULL,
        spread("fsdp_size: 4, ep_size: 2") | {"save_only_model": None},
        "model_init_kwargs",
        "save_only_model: true",
    ),
    (
        "topology",
        FULL,
        spread("fsdp_size: 4, ep_size: 2") | {"launch": "{accelerate_config: fsdp2, num_processes: 4}"},
        SPREAD,
        "divide them again",
    ),
    (
        "topology",
        FULL,
        spread("fsdp_size: 8, ep_size: 8") | {"launch": "{accelerate_config: ddp, num_processes: 8}"},
        SPREAD,
        "4 experts do not divide over ep_size 8",
    ),
    (
        "topology",
        FULL,
        spread("fsdp_size: 4, ep_size: 2, ep_implementation: all2all"),
        SPREAD,
        "none of auto, all_to_all",
    ),
    (
        "topology",
        FULL,
        spread("fsdp_size: 4, ep_size: 2") | {"model_name_or_path": "MODELS/dense"},
        SPREAD,
        "dense",
    ),
    (
        "topology",
        FULL,
        {"model_init_kwargs": "{experts_implementation: batched_mm}"},
        "model_init_kwargs",
        "only distributed_config is used here",
    ),
    (
        "topology",
        SCRATCH,
        {"model_init_kwargs": "{distributed_config: {fsdp_size: 1}}", "save_only_model": "true"},
        SPREAD,
        "from scratch is not loaded",
    ),
    (
        "topology",
        FULL,
        {"parallelism_config": "{cp_size: 2}"},
        "parallelism_config",
        "dies of it before the first step",
    ),
    # -------------------------------------------------------------- schedule
    ("schedule", LORA, {"warmup_steps": "500"}, "warmup_steps", "never gets there"),
    ("schedule", LORA, {"eval_steps": "1000"}, "eval_steps", "would never happen"),
    ("schedule", LORA, {"logging_steps": "1000"}, "logging_steps", "would never happen"),
    ("schedule", LORA, {"save_strategy": "epoch"}, "save_strategy", "no end of an epoch"),
    ("schedule", LORA, {"eval_strategy": "epoch"}, "eval_strategy", "no end of an epoch"),
    ("schedule", LORA, {"save_strategy": "'no'"}, "save_strategy", "no checkpoint"),
    ("schedule", LORA, {"gradient_accumulation_steps": "64"}, "gradient_accumulation_steps", "within a step"),
    ("schedule", SCRATCH, {"max_steps": "900", "save_steps": "1"}, "save_steps", "900 checkpoints"),
    ("schedule", SCRATCH, {"max_steps": "5000", "save_steps": "9000"}, "save_steps", "nothing would be kept"),
    # ------------------------------------------------------------------ disk
    (
        "disk",
        SCRATCH,
        HUGE | {"save_total_limit": "50"},
        "save_total_limit",
        "TB",
    ),
    ("disk", SCRATCH, HUGE | {"save_total_limit": None, "save_steps": "10"}, "output_dir", "is not set"),
    (
        "disk",
        SCRATCH,
        HUGE | {"save_total_limit": "1", "checkpoint": "{mirror: 's3://no-such-bucket-of-ours/runs'}"},
        "save_total_limit",
        "x 3 at once (save_total_limit 1, and the one before it until it is written + one on its way",
    ),
    # ------------------------------------------------------------------- hub
    (
        "hub",
        SCRATCH,
        {"release": "{repo_id: training-ready/x, summary: S., intended_use: I., limits: L.}"},
        "release",
        "release.license",
    ),
    ("hub", SCRATCH, {"release": "{repo_id: training-ready/x, license: mit}"}, "release", "release.summary"),
    (
        "hub",
        SCRATCH,
        {"release": str(SCRATCH["release"]).replace("scratch", "taken")},
        "release.repo_id",
        "no release of",
    ),
    # --------------------------------------------------------------- serving
    (
        "serving",
        MOE,
        {"model_name_or_path": "MODELS/qwen_moe", "release": "{target: tgi}"},
        "release.target",
        "vllm",
    ),
    (
        "serving",
        MOE,
        {"model_name_or_path": "MODELS/qwen_moe", "release": "{target: gguf}"},
        "release.target",
        "vllm",
    ),
    ("serving", SCRATCH, {"release": "{target: adapter}"}, "release.target", "nothing is adapted"),
    (
        "serving",
        LORA,
        {
            "moe": "{shared_base: {experts: 4, rank: 8, alpha: 16}}",
            "lora_target_modules": "[q_proj, k_proj, v_proj, o_proj]",
            "release": "{target: adapter}",
        },
        "release.target",
        "leave as a whole mixture",
    ),
    # ----------------------------------------------------------------- seeds
    ("seeds", LORA, corpus("leak", eval_split="val"), "data.eval_split", "1 of 11 conversations"),
    (
        "seeds",
        LORA,
        {"stream": "{mixture: {a: {}, b: {split: val}}}"},
        "data.eval_split",
        "10 of 10 conversations of val",
    ),
    (
        "seeds",
        LORA,
        {"stream": "{mixture: {a: {}, b: {corpus: final_dataset/leak/manifest.json, split: val}}}"},
        "data.eval_split",
        "10 of 10 conversations of val",
    ),
]


@pytest.mark.parametrize(
    ("probe", "base", "change", "key", "word"),
    MISTAKES,
    ids=[f"{m[0]}-{m[3]}-{i}" for i, m in enumerate(MISTAKES)],
)
def test_a_mistake_is_refused_at_its_key_and_line(
    check: Check, probe: str, base: Keys, change: Keys, key: str, word: str, tmp_path: Path
) -> None:
    keys = {**base, **change}
    if probe == "data" and change.get("data"):
        keys |= {key: None for key in NO_EVAL if "eval_split" not in str(change["data"])}
    report = check(keys)
    failures = [finding for name, finding in report.failures if name == probe and finding.key == key]
    assert failures, report.failures
    assert any(word in f"{finding.message} {finding.fix}" for finding in failures), failures
    written = [name for name, value in keys.items() if value is not None]
    line = written.index(key.partition(".")[0]) + 1
    assert {finding.where for finding in failures} == {f"recipe.yaml:{line}"}


def test_there_are_enough_mistakes_and_each_probe_has_some() -> None:
    counts = Counter(mistake[0] for mistake in MISTAKES)
    assert len(MISTAKES) >= 60
    # The memory of a step is traced by tests of its own, and what it costs is never a mistake.
    assert counts.keys() == set(PROBES) - {"memory", "time_cost"}
    assert min(counts.values()) >= 3


def test_wrong_credentials_are_named_by_the_bucket(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVH_S3_SECRET_KEY", "")
    monkeypatch.setenv("OVH_SECRET_KEY", "")
    report = check(LORA)
    [(_, finding)] = [failure for failure in report.failures if failure[0] == "bucket"]
    assert "OVH_S3_SECRET_KEY" in finding.message
    others = {outcome.probe: outcome for outcome in report.outcomes}
    assert others["data"].status == "not run"
    assert "bucket failed" in others["data"].findings[0].message


@pytest.mark.parametrize(
    ("variable", "value", "word"),
    [
        ("HF_TOKEN", "guessed", "HTTP 401"),
        ("HF_ENDPOINT", "http://127.0.0.1:9", "no hub answers"),
        ("HF_ENDPOINT", "http://me:topsecret@127.0.0.1:9", "(http://…@127.0.0.1:9)"),
    ],
)
def test_a_hub_that_would_refuse_the_push_is_found(
    check: Check, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, word: str
) -> None:
    monkeypatch.setenv(variable, value)
    report = check(SCRATCH)
    [finding] = [finding for name, finding in report.failures if name == "hub"]
    assert word in finding.message
    assert finding.where is not None
    assert finding.where.startswith("recipe.yaml:")


def test_a_hub_that_everybody_may_use_says_what_it_proves(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    others = [probe for probe in PROBES if probe not in ("keys", "hub")]
    with EmbeddedHub(tmp_path / "open") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint_url)
        [finding] = check(SCRATCH, skip=others).outcomes[PROBES.index("hub")].findings
        assert "token role write" in finding.message
    with EmbeddedHub(tmp_path / "read", token="write-me", read_token="read-me") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint_url)
        [(_, finding)] = check(SCRATCH, skip=others).failures
        assert "HTTP 401" in finding.message
        monkeypatch.setenv("TRAINING_READY_HUB_TOKEN", "write-me")
        assert check(SCRATCH, skip=others).passed
        monkeypatch.setenv("HF_TOKEN", "read-me")
        [(_, finding)] = check(SCRATCH, skip=others).failures
        assert "may only read" in finding.message


def test_a_release_that_is_replaced_only_on_purpose_is_a_remark(check: Check, hub: EmbeddedHub) -> None:
    others = [probe for probe in PROBES if probe not in ("keys", "hub")]
    name = "training-ready/older"
    with hub_api(hub.endpoint_url, "let-me-in") as api:
        api.create_repo(name)
        card = b"---\ntags: [training-ready]\n---\n"
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=name)
    report = check(SCRATCH | {"release": str(SCRATCH["release"]).replace("scratch", "older")}, skip=others)
    [remark, _] = report.outcomes[PROBES.index("hub")].findings
    assert remark.status == "warn"
    assert "1 file without a release.json" in remark.message
    assert "--replace" in str(remark.fix)


def test_a_card_that_could_not_be_written_is_found_offline(check: Check) -> None:
    others = [probe for probe in PROBES if probe not in ("keys", "hub")]
    keys = SCRATCH | {"release": "{repo_id: training-ready/x, license: mit}"}
    [(_, finding)] = check(keys, skip=others, offline=True).failures
    assert "release.summary, release.intended_use, release.limits" in finding.message
    assert finding.where == f"recipe.yaml:{list(keys).index('release') + 1}"
    nowhere = check(keys | {"release": "{license: mit}"}, skip=others, offline=True)
    assert nowhere.passed
    assert nowhere.outcomes[PROBES.index("hub")].findings[0].status == "warn"


def test_a_model_folder_without_a_tokenizer_is_named(check: Check, models: Path) -> None:
    empty = models / "no-tokenizer"
    AutoConfig.for_model("qwen3", vocab_size=600).save_pretrained(empty)
    others = [probe for probe in PROBES if probe not in ("keys", "template")]
    [(_, finding)] = check(LORA | {"model_name_or_path": str(empty)}, skip=others, offline=True).failures
    assert finding.key == "model_name_or_path"
    assert "holds no tokenizer" in finding.message
