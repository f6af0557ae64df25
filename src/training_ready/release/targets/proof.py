"""How different is what the engine computes? Inputs, the trained answers, and the measures of every verification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training_ready.release.targets.conversations import CONVERSATIONS, Messages
from training_ready.release.targets.render import TemplateError, jinja_renderer
from training_ready.release.targets.tokenizer_files import SPECIAL, chat_template, read_json, text

if TYPE_CHECKING:
    from torch import Tensor

LENGTH = 300
ROWS = 2


@dataclass(kw_only=True, slots=True, frozen=True)
class Finding:
    """One check: what was compared, what came out, and whether that is good enough."""

    check: str
    result: str
    passed: bool
    difference: float | None = None
    """max |Δlogit|, where logits were compared."""


def sample_inputs(config: Mapping[str, Any], seed: int = 0) -> list[list[int]]:
    """Two rows of 300 random token ids (fewer where the model's context is shorter)."""
    import torch

    length = min(LENGTH, int(config.get("max_position_embeddings") or LENGTH))
    generator = torch.Generator().manual_seed(seed)
    ids: list[list[int]] = torch.randint(config["vocab_size"], (ROWS, length), generator=generator).tolist()
    return ids


def trained_logits(release: Path, inputs: list[list[int]], dtype: str) -> Tensor:
    """(rows, tokens, V) float32 logits of the release in transformers, computed in `dtype` on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        release, dtype=getattr(torch, dtype), trust_remote_code=False, use_safetensors=True
    ).eval()
    with torch.no_grad():
        return torch.cat([model(torch.tensor([row])).logits for row in inputs]).float()


def compare_logits(trained: Tensor, served: Tensor, limit: float) -> Finding:
    """`limit` is for logits up to 1; larger ones may differ by as much more."""
    if trained.shape != served.shape:
        return Finding(
            check="logits", result=f"{tuple(served.shape)}, not {tuple(trained.shape)}", passed=False
        )
    difference = float((trained - served).abs().max())
    agree = float((trained.argmax(-1) == served.argmax(-1)).float().mean())
    allowed = limit * max(1.0, float(trained.abs().max()))
    result = f"max |Δlogit| {difference:.1e} (allowed {allowed:.1e}), the same best token at {agree:.1%} of positions"
    return Finding(check="logits", result=result, passed=difference <= allowed, difference=difference)


def compare_ids(trained: list[list[int]], served: list[list[int]], size: int) -> Finding:
    wrong = sum(one != other for one, other in zip(trained, served, strict=True))
    count = sum(len(ids) for ids in trained)
    result = f"{count:,} ids of {size:,} bytes in many scripts, {wrong} of {len(trained)} paragraphs differ"
    return Finding(check="token ids", result=result, passed=not wrong)


def trained_ids(release: Path, texts: Sequence[str]) -> list[list[int]]:
    """The ids that tokenizer.json gives to `texts`, special tokens around them included.

    Not through a class of transformers, which may split words its own way (5.23 reads any tokenizer beside a qwen2
    configuration as Qwen2Tokenizer, whose pre-tokenizer is not the file's).
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(release / "tokenizer.json"))
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


def special_tokens(release: Path) -> dict[str, str]:
    """Name to characters, as training gave them to its template."""
    settings = read_json(release / "tokenizer_config.json")
    return {name: text(settings[name]) for name in SPECIAL if settings.get(name)}


def trained_prompts(release: Path) -> dict[str, str | None]:
    """Every conversation as training rendered it; None where its template refuses the conversation."""
    return prompts_of(chat_template(release), special_tokens(release))


def prompts_of(template: str, special: Mapping[str, str]) -> dict[str, str | None]:
    """The same for a template by itself."""
    render = jinja_renderer(template, special)

    def prompt(messages: Messages) -> str | None:
        try:
            return render(messages)
        except TemplateError:
            return None

    return {name: prompt(messages) for name, messages in CONVERSATIONS.items()}


def compare_prompts(trained: Mapping[str, str | None], served: Mapping[str, str | None]) -> Finding:
    """A conversation that both refuse counts as the same; a single turn must be rendered, with the client's words."""
    wrong = [name for name in trained if trained[name] != served.get(name)]
    words = CONVERSATIONS["single-turn"][0]["content"].strip()
    if words not in (trained["single-turn"] or ""):
        return Finding(
            check="chat template", result="a client's plain text does not reach the prompt", passed=False
        )
    refused = [name for name, prompt in trained.items() if prompt is None]
    result = f"{len(trained)} conversations, {len(wrong)} differ" + (f": {', '.join(wrong)}" if wrong else "")
    result += f" (both refuse {', '.join(refused)})" if refused and not wrong else ""
    return Finding(check="chat template", result=result, passed=not wrong)
