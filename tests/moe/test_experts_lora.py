from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from training_ready.moe.adapter_files import load_expert_adapters, save_expert_adapters
from training_ready.moe.experts_lora import add_expert_adapters, expert_adapters, merge_expert_adapters
from training_ready.moe.families import MoEError

SETTINGS = {"r": 4, "lora_alpha": 8, "target_modules": [], "lora_dropout": 0.0}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def randomise(adapters):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for adapter in adapters:
            adapter.B.normal_(std=0.3, generator=generator)


def adapted(model, **changes):
    model = copy.deepcopy(model).requires_grad_(False)
    randomise(add_expert_adapters(model, **{"rank": 4, "alpha": 8.0, **changes}))
    return model


def language_loss(model, ids):
    return model(input_ids=ids, labels=ids, use_cache=False, output_router_logits=False).loss


def test_gradients_logits_and_files_agree_with_peft(model_type, tiny_model, token_ids, tmp_path):
    base = tiny_model(model_type).eval()
    ours = adapted(base).eval()
    save_expert_adapters(ours, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True).eval()
    with torch.no_grad():
        logits = ours(input_ids=token_ids).logits
        assert torch.allclose(logits, theirs(input_ids=token_ids).logits, atol=1e-5)
        assert not torch.allclose(logits, base(input_ids=token_ids).logits, atol=1e-3)
    for model in (ours, theirs):
        language_loss(model, token_ids).backward()
    pairs = 0
    for name, adapters in expert_adapters(ours):
        wrapper = theirs.get_submodule(f"base_model.model.{name}")
        for projection in ("down_proj", "gate_up_proj"):
            assert wrapper.parameter_name == projection
            a, b = wrapper.lora_A["default"].weight.grad, wrapper.lora_B["default"].weight.grad
            mine = adapters[projection]
            assert torch.allclose(mine.A.grad.flatten(0, 1), a, atol=1e-6)
            assert torch.allclose(mine.B.grad.permute(1, 2, 0).flatten(1), b, atol=1e-6)
            assert mine.A.grad.abs().max() > 1e-5
            wrapper, pairs = wrapper.base_layer, pairs + 1
    assert pairs >= 2
    frozen = [name for name, p in ours.named_parameters() if ".experts." in name and "split_lora" not in name]
    assert frozen
    assert all(ours.get_parameter(name).grad is None for name in frozen)


@pytest.mark.parametrize("targets", [BOTH, BOTH[::-1], BOTH[:1], BOTH[1:]])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_reads_what_peft_wrote(model_type, targets, tiny_model, token_ids, tmp_path):
    base = tiny_model(model_type).eval()
    theirs = get_peft_model(
        copy.deepcopy(base), LoraConfig(**SETTINGS, target_parameters=targets, init_lora_weights=False)
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    assert load_expert_adapters(ours, tmp_path) == []
    with torch.no_grad():
        expected = theirs(input_ids=token_ids).logits
        assert torch.allclose(ours(input_ids=token_ids).logits, expected, atol=1e-5)
        assert not torch.allclose(base(input_ids=token_ids).logits, expected, atol=1e-3)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "granitemoe"])
def test_merging_changes_no_logit_and_leaves_a_plain_model(model_type, tiny_model, token_ids, tmp_path):
    base = tiny_model(model_type).eval()
    model = adapted(base).eval()
    with torch.no_grad():
        expected = model(input_ids=token_ids).logits
        merge_expert_adapters(model)
        assert torch.allclose(model(input_ids=token_ids).logits, expected, atol=1e-5)
        assert model.state_dict().keys() == base.state_dict().keys()
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
        assert torch.allclose(again(input_ids=token_ids).logits, expected, atol=1e-5)
    with pytest.raises(MoEError, match="no expert adapters to merge"):
        merge_expert_adapters(model)


def test_a_bf16_merge_rounds_once(tiny_model):
    model = adapted(tiny_model("mixtral").bfloat16())
    name, adapters = next(expert_adapters(model))
    weight = model.get_submodule(name).gate_up_proj
    lora = adapters["gate_up_proj"]
    exact = weight.double() + 2.0 * torch.bmm(lora.B.double(), lora.A.double())
    merge_expert_adapters(model)
    assert (weight == exact.float().bfloat16()).float().mean() > 0.999
    assert weight.dtype == torch.bfloat16


def test_fresh_adapters_change_nothing(tiny_model, token_ids):
    model = tiny_model("qwen3_moe").eval()
    with torch.no_grad():
        before = model(input_ids=token_ids).logits
        add_expert_adapters(model, rank=4, alpha=8)
        assert torch.equal(model(input_ids=token_ids).logits, before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_dropout_gives_the_same_gradients(reentrant, tiny_model, token_ids):
    def gradients(checkpointing):
        model = adapted(tiny_model("qwen3_moe"), dropout=0.2).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(11)
        language_loss(model, token_ids).backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == len(checkpointed) == 8
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(plain, checkpointed, strict=True))


def test_dropout_acts_in_training_only(tiny_model, token_ids):
    model = adapted(tiny_model("mixtral"), dropout=0.5)
    with torch.no_grad():
        evaluated = [model.eval()(input_ids=token_ids).logits for _ in range(2)]
        trained = [model.train()(input_ids=token_ids).logits for _ in range(2)]
    assert torch.equal(*evaluated)
    assert not torch.allclose(*trained, atol=1e-4)


def test_less_is_kept_for_backward_than_with_peft(tiny_model):
    """At E=32 with few tokens the expert stack outweighs the activations."""
    shape = {"num_local_experts": 32, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    base = tiny_model("mixtral", **shape)
    ids = torch.randint(3, 96, (1, 16))

    def kept_bytes(model):
        model.enable_input_require_grads()  # as with adapters on the attention: every expert's input needs a gradient
        sizes: dict[int, int] = {}

        def keep(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = language_loss(model.train(), ids)
        loss.backward()
        return sum(size for pointer, size in sizes.items() if pointer not in parameters)

    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(**SETTINGS, target_parameters=BOTH))
    ours, peft = kept_bytes(adapted(base)), kept_bytes(theirs)
    stack = 2 * 32 * (2 * 64 * 64 + 64 * 64) * 4
    assert peft > stack, "PEFT no longer keeps an adapted copy of the experts: update docs/moe.md"
    assert ours < peft - stack / 2


def test_attention_by_peft_and_experts_of_ours_make_one_folder(tiny_model, token_ids, tmp_path):
    base = tiny_model("qwen3_moe").eval()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    randomise(add_expert_adapters(model, rank=4, alpha=8))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * (2 * 2 + 2 * 2)
    model.save_pretrained(tmp_path)
    save_expert_adapters(model, tmp_path)
    with torch.no_grad():
        expected = model(input_ids=token_ids).logits
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        assert torch.allclose(theirs(input_ids=token_ids).logits, expected, atol=1e-5)
    others = load_expert_adapters(copy.deepcopy(base), tmp_path)
    assert len(others) == 8
    assert all("_proj.lora_" in key for key in others)

    other_rank = copy.deepcopy(base)
    add_expert_adapters(other_rank, rank=2, alpha=8)
    with pytest.raises(MoEError, match=r"r=4 and lora_alpha=8, the experts have r=2"):
        save_expert_adapters(other_rank, tmp_path)


def test_generation_uses_the_adapters(tiny_model, token_ids):
    model = adapted(tiny_model("mixtral"), alpha=64.0).eval()
    merged = copy.deepcopy(model)
    merge_expert_adapters(merged)
    settings = {"max_new_tokens": 6, "do_sample": False}
    written = [m.generate(token_ids, **settings) for m in (model, merged)]
    assert torch.equal(*written)


def test_a_training_step_lowers_the_loss(tiny_model, token_ids):
    model = adapted(tiny_model("deepseek_v3")).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        optimiser.zero_grad()
        loss = language_loss(model, token_ids)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_wrong_uses_are_refused(tiny_model, tmp_path):
    model = tiny_model("mixtral")
    with pytest.raises(MoEError, match="rank of expert adapters is 0"):
        add_expert_adapters(model, rank=0, alpha=1)
    with pytest.raises(MoEError, match="no fused projection 'up_proj'"):
        add_expert_adapters(model, rank=2, alpha=1, projections=["up_proj"])
    with pytest.raises(MoEError, match="no expert adapters to save"):
        save_expert_adapters(model, tmp_path)
    with pytest.raises(MoEError, match="not a readable PEFT adapter"):
        load_expert_adapters(model, tmp_path)
    wide = tiny_model("mixtral", intermediate_size=40)
    add_expert_adapters(wide, rank=2, alpha=1)
    with pytest.raises(MoEError, match="already adapted"):
        add_expert_adapters(wide, rank=2, alpha=1)
    save_expert_adapters(wide, tmp_path)
    with pytest.raises(MoEError, match=r"shape .*these experts need"):
        load_expert_adapters(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_parameters": []}))
    with pytest.raises(MoEError, match="names none of gate_up_proj, down_proj"):
        load_expert_adapters(tiny_model("mixtral"), tmp_path)
