"""Do the releases that TGI 3.3.7 pins load an export, and compute what was trained?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from training_ready.release.export import ExportError
from training_ready.release.targets.commands import release_export, release_verify
from training_ready.release.targets.export import export_release
from training_ready.release.targets.pinned import (
    PinnedError,
    cache_folder,
    pinned_folder,
    pinned_python,
    run_pinned,
)
from training_ready.release.targets.proof import Finding
from training_ready.release.targets.verify import verify_export

EXACT = [
    *("llama", "llama3-rope", "mistral", "mistral-tied", "mistral-window", "qwen2", "qwen3"),
    *("mixtral", "mixtral-top1", "mixtral-tied", "phi3", "gemma3_text", "granite", "starcoder2"),
]
CLOSE = ["cohere", "deepseek_v2", "llama4_text", "mixtral-narrow-heads", "llama3-narrow-heads"]
Build = Callable[..., Path]
built = pytest.mark.skipif(
    not pinned_folder(cache_folder()).exists(), reason="the environment of TGI's releases is not built"
)


def findings_of(release: Path, tmp_path: Path) -> dict[str, Finding]:
    out = export_release(release, tmp_path / "out", "tgi").folder
    return {finding.check: finding for finding in verify_export(out, release, "tgi", cache=cache_folder())}


@pytest.mark.slow
@pytest.mark.parametrize("family", [*EXACT, *CLOSE])
def test_the_export_computes_what_was_trained(tiny_release: Build, tmp_path: Path, family: str) -> None:
    findings = findings_of(tiny_release(family), tmp_path)
    assert [finding for finding in findings.values() if not finding.passed] == []
    difference = findings["logits"].difference
    assert difference is not None
    assert difference <= (1e-5 if family in CLOSE else 0.0)


@pytest.mark.slow
def test_the_release_itself_does_not_even_load(tiny_release: Build, tmp_path: Path) -> None:
    (tmp_path / "texts.json").write_text('["I slept."]')
    texts = {"texts": str(tmp_path / "texts.json"), "tokens": str(tmp_path / "tokens.json")}
    job = {"folder": str(tiny_release("mixtral")), **texts}
    with pytest.raises(PinnedError, match="TokenizersBackend"):
        run_pinned(pinned_python(cache_folder()), job)


@built
def test_a_wrong_rotary_base_or_a_changed_template_is_found(
    tiny_release: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release, out = tiny_release("mixtral"), tmp_path / "out"
    release_export(release, out, "tgi")
    release_verify(out, "tgi", release, json=True)
    shown = capsys.readouterr().out
    findings = json.loads(shown[shown.index("[") :])
    assert [finding["passed"] for finding in findings] == [True] * 5
    assert findings[1]["difference"] == 0.0
    config, settings = (
        json.loads((out / name).read_bytes()) for name in ("config.json", "tokenizer_config.json")
    )
    # Of the same length, so that only what is computed differs.
    (out / "config.json").write_text(json.dumps({**config, "rope_theta": 10_000.0}, indent=2) + "\n")
    changed = settings["chat_template"].replace("<|im_start|>assistant", "<|im_start|>therapist")
    content = json.dumps({**settings, "chat_template": changed}, indent=2, ensure_ascii=False)
    (out / "tokenizer_config.json").write_text(content + "\n")
    with pytest.raises(ExportError, match="logits, chat template"):
        release_verify(out, "tgi", release)
    assert "FAIL logits" in capsys.readouterr().out
