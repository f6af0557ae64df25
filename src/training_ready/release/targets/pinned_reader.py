"""What does TGI's Python make of this folder? Runs inside the isolated environment; knows nothing of this package.

Standard input is a job, the last line of standard output its answer, both JSON:
{folder, inputs, logits, dtype, texts, tokens, templates[{template, context}]} -> {tokens, eos, rendered, versions}.
Logits go to the file `logits`, because they are large; ids of `texts` to the file `tokens`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

# Methods of strings and mappings that minijinja-contrib 2.8 gives to the router.
STRING_METHODS = (
    *(
        "capitalize",
        "count",
        "endswith",
        "find",
        "isalnum",
        "isalpha",
        "isdigit",
        "islower",
        "isnumeric",
        "isspace",
    ),
    *(
        "isupper",
        "lower",
        "lstrip",
        "replace",
        "rfind",
        "rstrip",
        "split",
        "splitlines",
        "startswith",
        "strip",
    ),
    *("title", "upper"),
)
MAPPING_METHODS = ("get", "items", "keys", "values")


def main() -> None:
    job = json.loads(sys.stdin.read())
    answer: dict[str, Any] = {"versions": _versions()}
    if job.get("inputs"):
        _write_logits(job)
    if job.get("texts"):
        from transformers import AutoTokenizer

        with open(job["texts"], encoding="utf-8") as file:
            texts = json.load(file)
        tokenizer = AutoTokenizer.from_pretrained(job["folder"])
        with open(job["tokens"], "w", encoding="utf-8") as file:
            json.dump(tokenizer(texts)["input_ids"], file)
        answer |= {
            "eos": tokenizer.eos_token_id,
            "bos": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
        }
    answer["rendered"] = [_render(**template) for template in job.get("templates", [])]
    print(json.dumps(answer))


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {
        name: version(name) for name in ("transformers", "tokenizers", "safetensors", "minijinja", "torch")
    }


def _write_logits(job: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        job["folder"], torch_dtype=getattr(torch, job["dtype"])
    ).eval()
    with torch.no_grad():  # row by row, with a mask: Llama 4 of 4.51.0 runs neither batches nor without
        rows = [torch.tensor([ids]) for ids in job["inputs"]]
        logits = torch.cat([model(row, attention_mask=torch.ones_like(row)).logits for row in rows])
    save_file({"logits": logits.float().contiguous()}, job["logits"])


def _render(template: str, context: dict[str, Any]) -> dict[str, str]:
    """{"text": ...} or {"error": ...}, as the router would render."""
    import minijinja

    environment: Any = minijinja.Environment()
    environment.add_function("raise_exception", _raise)
    environment.add_function("strftime_now", _now)
    environment.add_function("python_method", _method)
    try:
        return {"text": environment.render_str(template, **context)}
    except (minijinja.TemplateError, ValueError) as error:
        return {"error": str(error).splitlines()[0]}


def _raise(message: str) -> None:
    raise ValueError(message)


def _now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)


def _method(value: Any, name: str, *arguments: Any) -> Any:
    known = (
        STRING_METHODS
        if isinstance(value, str)
        else MAPPING_METHODS
        if isinstance(value, dict)
        else ["count"]
    )
    if name not in known:
        raise ValueError(f"unknown method: {type(value).__name__} has no method named {name}")
    result = getattr(value, name)(*arguments)
    if name in ("items", "keys", "values"):
        return [list(entry) if isinstance(entry, tuple) else entry for entry in result]
    return result


if __name__ == "__main__":
    main()
