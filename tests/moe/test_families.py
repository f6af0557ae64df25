from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from training_ready.moe.families import FAMILIES, MoEError, moe_family, routed_layers

DENSE_LAYERS = {"qwen2_moe": [1], "deepseek_v2": [0], "deepseek_v3": [0], "glm4_moe": [0], "dots1": [0]}


def test_every_row_agrees_with_a_built_model(model_type, tiny_model, token_ids):
    model = tiny_model(model_type).eval()
    family = moe_family(model.config)
    layers = routed_layers(model)

    assert (family.num_experts, family.top_k) == (4, 2)
    expected = [n for n in range(model.config.num_hidden_layers) if n not in DENSE_LAYERS.get(model_type, [])]
    assert [routed.layer for routed in layers] == expected
    class_names = {type(module).__name__ for module in model.modules()}
    assert {family.layout.decoder_layer_class, family.layout.block_class} <= class_names
    assert all(routed.router.weight.shape == (4, 32) for routed in layers)

    outputs = []
    layers[0].router.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    result = model(input_ids=token_ids)
    logits, weights, chosen = outputs[0]
    assert logits.shape == (30, 4)
    assert weights.shape == chosen.shape == (30, 2)
    sums = weights.float().sum(dim=-1) / getattr(model.config, "routed_scaling_factor", 1.0)
    assert torch.allclose(sums, torch.ones(30), atol=1e-5) == family.renormalised
    by_logits = logits.topk(2).indices.sort().values
    if family.layout.chosen_by_logits:
        assert torch.equal(chosen.sort().values, by_logits)
    if family.layout.balance == "aux_loss":
        assert result.aux_loss is not None
        assert family.aux_loss_coef == model.config.router_aux_loss_coef


def test_the_balancing_bias_decides_the_choice(model_type, tiny_model, token_ids):
    model = tiny_model(model_type).eval()
    family = moe_family(model.config)
    first = routed_layers(model)[0]
    if family.layout.balance != "bias":
        with pytest.raises(MoEError, match="not balanced by a bias"):
            first.bias(family)
        return
    chosen = []
    first.router.register_forward_hook(lambda _module, _inputs, output: chosen.append(output[2]))
    with torch.no_grad():
        first.bias(family).view(-1)[3] = 10.0
        model(input_ids=token_ids)
    assert (chosen[0] == 3).any(dim=-1).all()


@pytest.mark.parametrize(
    ("model_type", "follows"), [("qwen3_moe", True), ("mixtral", False), ("deepseek_v2", False)]
)
def test_norm_topk_prob_counts_only_where_the_router_reads_it(model_type, follows, tiny_config):
    settings = [
        moe_family(tiny_config(model_type, norm_topk_prob=value)).renormalised for value in (True, False)
    ]
    assert (settings == [True, False]) == follows


def test_top_1_with_weights_that_sum_to_one_leaves_the_router_without_signal(tiny_model, token_ids):
    for k, learns in ((1, False), (2, True)):
        model = tiny_model("mixtral", num_experts_per_tok=k)
        logits = model(input_ids=token_ids).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten()).backward()
        norm = routed_layers(model)[0].router.weight.grad.norm()
        assert (norm > 1e-6) == learns == moe_family(model.config).router_learns_from_language_loss


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3", "gpt2", "gemma3"])
def test_dense_models_have_no_family(model_type):
    assert moe_family(AutoConfig.for_model(model_type)) is None


@pytest.mark.parametrize("model_type", ["dbrx", "jetmoe", "lfm2_moe"])
def test_an_unknown_mixture_is_refused_with_what_is_missing(model_type):
    with pytest.raises(MoEError, match=rf"'{model_type}'.*experts.*router class.*block class"):
        moe_family(AutoConfig.for_model(model_type))


def test_a_configuration_without_its_counts_is_refused():
    config = AutoConfig.for_model("deepseek_v2")
    with pytest.raises(MoEError, match=r"deepseek_v2.*'num_experts_per_tok' is None"):
        moe_family(config)


def test_a_model_with_only_dense_layers_is_refused(tiny_config):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe", mlp_only_layers=[0, 1]))
    with pytest.raises(MoEError, match="all layers dense"):
        routed_layers(model)


def test_the_router_that_peft_trains_is_the_one_found(tiny_model, token_ids):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny_model("qwen3_moe"), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate"])
    )
    found = routed_layers(model)
    assert len(found) == 2
    ran = []
    for routed in found:
        assert routed.router.weight.requires_grad
        routed.router.register_forward_hook(lambda module, *_: ran.append(module))
    model(input_ids=token_ids)
    assert ran == [routed.router for routed in found]


def test_table_names_no_class_twice():
    rows = FAMILIES.values()
    assert len({row.router_class for row in rows}) == len({row.block_class for row in rows}) == len(FAMILIES)
