from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

from training_ready.moe.families import MoEError, routed_layers
from training_ready.moe.monitor import ExpertLoadMonitor
from training_ready.moe.parameters import describe_experts
from training_ready.moe.shared_base import (
    build_shared_base,
    lora_layers,
    set_router_rows,
    shared_base_adapters,
    train_shared_base,
)
from training_ready.moe.shared_base_files import export_shared_base, load_shared_base, save_shared_base

from . import dense_models

CONFIGS = {"mistral": MistralConfig, "llama": LlamaConfig, "qwen3": Qwen3Config}


def dense_model(model_type: str = "mistral", **changes):
    return dense_models.random_model(
        CONFIGS[model_type](**{**dense_models.SHAPE, "max_position_embeddings": 64, **changes})
    )


def shared_model(model_type: str = "mistral", *, trained: bool = True, dense=None, **changes):
    settings = {"experts": 4, "top_k": 2, "rank": 4, "alpha": 8.0, **changes}
    model = build_shared_base(dense or dense_model(model_type), **settings)
    if trained:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for _, _, adapter in shared_base_adapters(model):
                adapter.B.normal_(std=0.3, generator=generator)
            for routed in routed_layers(model):
                routed.router.weight.normal_(std=0.5, generator=generator)
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def largest_difference(a, b):
    return float((a - b).abs().max())


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_starts_as_the_dense_model(model_type, token_ids):
    dense = dense_model(model_type)
    expected = logits(dense, token_ids)
    assert largest_difference(logits(shared_model(trained=False, dense=dense), token_ids), expected) <= 1e-5


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
@pytest.mark.parametrize("top_k", [2, 3])
def test_the_exported_model_is_the_trained_one(model_type, top_k, token_ids, tmp_path):
    model = shared_model(model_type, top_k=top_k)
    expected = logits(model, token_ids)
    assert largest_difference(expected, logits(dense_model(model_type), token_ids)) > 0.05
    written = export_shared_base(model, tmp_path / "out", shard_bytes=40_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    plain, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert type(plain).__name__ == ("Qwen3MoeForCausalLM" if model_type == "qwen3" else "MixtralForCausalLM")
    assert written == sum(p.numel() * p.element_size() for p in plain.parameters())
    assert plain.config.rope_parameters["rope_theta"] == 54_321.0
    assert (plain.config.rms_norm_eps, plain.config.head_dim) == (3e-4, 8)
    assert largest_difference(logits(plain.eval(), token_ids), expected) <= 1e-5


def test_tied_heads_stay_tied(token_ids, tmp_path):
    model = shared_model("llama", dense=dense_model("llama", tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    export_shared_base(model, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert plain.lm_head.weight.data_ptr() == plain.model.embed_tokens.weight.data_ptr()
    assert largest_difference(logits(plain, token_ids), logits(model, token_ids)) <= 1e-5


def test_gradients_equal_those_of_the_materialised_experts(token_ids, tmp_path):
    """dL/dB_e = s * dL/dW_e A_e^T and dL/dA_e = s * B_e^T dL/dW_e, from a plain Mixtral's dense gradients."""
    model = shared_model()
    export_shared_base(model, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    for each in (model, plain):
        each.train()(input_ids=token_ids, labels=token_ids, use_cache=False).loss.backward()
    for layer, name, adapter in shared_base_adapters(model):
        experts = plain.model.layers[layer].mlp.experts
        dense = {
            "gate_proj": experts.gate_up_proj.grad[:, :56],
            "up_proj": experts.gate_up_proj.grad[:, 56:],
            "down_proj": experts.down_proj.grad,
        }[name]
        for mine, theirs in (
            (adapter.B.grad, adapter.scaling * dense @ adapter.A.detach().mT),
            (adapter.A.grad, adapter.scaling * adapter.B.detach().mT @ dense),
        ):
            assert theirs.abs().max() > 1e-4
            assert largest_difference(mine, theirs) <= 1e-5 * float(theirs.abs().max()) + 1e-8
    for mine, theirs in zip(routed_layers(model), routed_layers(plain), strict=True):
        assert torch.allclose(mine.router.weight.grad, theirs.router.weight.grad, rtol=1e-5, atol=1e-6)


def test_only_adapters_and_routers_train(token_ids):
    model = shared_model(trained=False).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = model(input_ids=token_ids, labels=token_ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.05
    changed = {
        name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])
    }
    assert changed == {
        name for name in before if ".experts.adapters." in name or name.endswith(".gate.weight")
    }


def test_no_adapted_weight_is_kept_for_backward(token_ids):
    dense = dense_model(intermediate_size=400)
    model = shared_model(dense=dense).train()
    model.enable_input_require_grads()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes: list[tuple[int, ...]] = []

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=token_ids, labels=token_ids)
    assert shapes
    assert not any(shape[-2:] in {(400, 48), (48, 400)} for shape in shapes)


def test_load_is_watched_and_the_balance_loss_sees_the_routers(token_ids):
    model = shared_model().train()
    with ExpertLoadMonitor(model) as monitor:
        out = model(input_ids=token_ids, labels=token_ids, output_router_logits=True)
        snapshot = monitor.snapshot("train")
    assert snapshot.tokens == token_ids.numel()
    assert [len(layer.load) for layer in snapshot.layers] == [4, 4]
    assert [tuple(layer.shape) for layer in out.router_logits] == [(30, 4)] * 2
    out.aux_loss.backward()
    assert all(float(routed.router.weight.grad.abs().max()) > 0 for routed in routed_layers(model))


def test_checkpointing_gives_the_same_gradients(token_ids):
    def gradients(checkpointing):
        model = shared_model(dropout=0.2).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(11)
        model(input_ids=token_ids, labels=token_ids).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == 2 * (3 * 2 + 1)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(plain, checkpointed, strict=True))


def test_saved_and_loaded(token_ids, tmp_path):
    model = shared_model()
    save_shared_base(model, tmp_path, experts=["a", "b", "c", "d"])
    again = load_shared_base(dense_model(), tmp_path)
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 150_000
    with pytest.raises(
        MoEError, match=r"layers\.0\.gate_proj\.B has shape \(4, 56, 4\), .* needs \(4, 60, 4\)"
    ):
        load_shared_base(dense_model(intermediate_size=60), tmp_path)
    with pytest.raises(MoEError, match=r"no tensor layers\.2\.router"):
        load_shared_base(dense_model(num_hidden_layers=3), tmp_path)
    with pytest.raises(MoEError, match=r"shared_base\.json"):
        load_shared_base(dense_model(), tmp_path / "nowhere")


def test_attention_adapters_of_peft_train_beside_and_are_merged(token_ids, tmp_path):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    model = get_peft_model(shared_model(), lora).eval()
    train_shared_base(model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * (2 * 2 + 3 * 2 + 1)
    assert lora_layers(model) == [f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "oq"]
    expected = logits(model, token_ids)
    assert largest_difference(expected, logits(shared_model(), token_ids)) > 0.01
    export_shared_base(model, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert largest_difference(logits(plain, token_ids), expected) <= 1e-5


@pytest.mark.parametrize(
    ("settings", "strange"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"target_modules": ["q_proj", "gate"]}, r"mlp\.gate\.lora_A"),
        ({"target_modules": ["q_proj", "v_proj"], "use_dora": True}, "lora_magnitude_vector"),
        ({"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["norm"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "v_proj"], "lora_bias": True}, r"lora_B\.default\.bias"),
    ],
)
def test_adapters_that_no_export_could_merge_are_refused(settings, strange):
    model = get_peft_model(shared_model(), LoraConfig(r=4, **settings))
    with pytest.raises(MoEError, match=rf"{strange}.* would train .* plain LoRA on the attention only"):
        train_shared_base(model)


def test_a_bf16_export_rounds_each_weight_once(tmp_path):
    model = shared_model(dense=dense_model().bfloat16())
    export_shared_base(model, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    adapter = next(adapter for _, name, adapter in shared_base_adapters(model) if name == "down_proj")
    weight = model.model.layers[0].mlp.experts.shared.down_proj.weight
    exact = weight.double() + 2.0 * adapter.B[3].double() @ adapter.A[3].double()
    stored = plain.model.layers[0].mlp.experts.down_proj[3]
    assert stored.dtype == torch.bfloat16
    assert (stored == exact.float().bfloat16()).float().mean() > 0.999


def test_the_shared_feed_forward_counts_as_used_by_every_token():
    report = describe_experts(shared_model())
    adapters = 2 * 4 * 4 * 3 * (48 + 56)
    assert report["shared_experts"].total == 2 * 3 * 48 * 56
    assert (report["experts"].total, report["experts"].trainable) == (adapters, adapters)
    assert report.active == report.total - adapters // 2


def test_router_rows_are_set_layer_by_layer():
    model = shared_model(trained=False)
    rows = torch.randn(2, 4, 48)
    set_router_rows(model, rows)
    assert all(torch.equal(r.router.weight, rows[r.layer]) for r in routed_layers(model))
    with pytest.raises(MoEError, match=r"\(2, 3, 48\), this model needs \(2, 4, 48\)"):
        set_router_rows(model, rows[:, :3])


def test_weights_in_memory_of_four_experts_of_a_12b_base():
    """The Mistral-Nemo shape on the meta device: 24.5 GB shared against 77.3 GB materialised, in bf16."""
    nemo = MistralConfig(
        vocab_size=131_072,
        hidden_size=5120,
        intermediate_size=14_336,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        sliding_window=None,
    )
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(nemo, dtype=torch.bfloat16)
    size = sum(p.numel() for p in dense.parameters())
    model = build_shared_base(dense, experts=4, top_k=2, rank=16, alpha=16, dtype=torch.bfloat16)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)

    def gigabytes(module: nn.Module) -> float:
        return sum(p.numel() * p.element_size() for p in module.parameters()) / 1e9

    adapters = sum(p.numel() for _, _, adapter in shared_base_adapters(model) for p in adapter.parameters())
    assert adapters == 40 * 4 * 16 * 3 * (5120 + 14_336)
    assert size == 12_247_782_400
    assert sum(p.numel() for p in model.parameters()) == size + adapters + 40 * 4 * 5120
    assert gigabytes(model) == pytest.approx(24.5 + 0.3, abs=0.05)
    assert gigabytes(plain) == pytest.approx(77.3, abs=0.05)


def test_what_cannot_be_held_is_refused(tmp_path):
    settings = {"experts": 4, "top_k": 2, "rank": 4, "alpha": 8.0}
    with pytest.raises(MoEError, match="attention_bias=True"):
        build_shared_base(dense_model("llama", attention_bias=True), **settings)
    with pytest.raises(MoEError, match="constant 1: the router would get no gradient"):
        build_shared_base(dense_model(), **{**settings, "top_k": 1})
    with pytest.raises(MoEError, match="top_k=5 of 4"):
        build_shared_base(dense_model(), **{**settings, "top_k": 5})
    model = shared_model()
    (tmp_path / "something").touch()
    with pytest.raises(MoEError, match="not empty"):
        export_shared_base(model, tmp_path)
    with pytest.raises(MoEError, match="3 names for 4 experts"):
        save_shared_base(copy.deepcopy(model), tmp_path, experts=["a", "b", "c"])
