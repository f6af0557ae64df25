from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from training_ready.moe.parameters import describe_experts, router_parameters


def test_groups_cover_every_parameter_and_experts_are_the_fused_weights(model_type, tiny_model):
    model = tiny_model(model_type)
    report = describe_experts(model)
    assert report.total == sum(p.numel() for p in model.parameters()) == sum(g.total for g in report.groups)
    assert report["other"].total == 0 or model_type in {"qwen3_next", "minimax", "gpt_oss"}
    fused = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert report["experts"].total == fused > 0
    assert report.active == report.total - fused // 2
    sparse = len(router_parameters(model))
    assert report["router"].total >= sparse * 4
    assert all(parameter.shape[-1] in (4, 32) for parameter in router_parameters(model).values())


def test_shared_experts_are_their_own_group(tiny_model):
    for model_type in ("qwen2_moe", "granitemoeshared", "deepseek_v3"):
        assert describe_experts(tiny_model(model_type))["shared_experts"].total > 0
    assert describe_experts(tiny_model("mixtral"))["shared_experts"].total == 0


def test_trainable_follows_the_adapters(tiny_model):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny_model("mixtral"),
        LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]),
    )
    report = describe_experts(model)
    trainable = {group.name: group.trainable for group in report.groups if group.trainable}
    assert trainable.keys() == {"attention", "experts"}
    assert trainable["attention"] == 2 * 2 * (32 + 32)
    assert trainable["experts"] == 2 * 4 * 2 * (24 + 32)
    assert report.trainable == sum(trainable.values())


def test_a_dense_model_uses_all_of_itself():
    config = AutoConfig.for_model(
        "llama",
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
    )
    model = AutoModelForCausalLM.from_config(config)
    report = describe_experts(model)
    assert report.active == report.total == report.trainable
    assert report["experts"].total == report["router"].total == 0
    assert report["feed_forward"].total == 3 * 16 * 16
    assert router_parameters(model) == {}


def test_a_frozen_model_trains_nothing(tiny_model):
    model = tiny_model("qwen3_moe").requires_grad_(False)
    assert describe_experts(model).trainable == 0
    assert len(router_parameters(model)) == 2
