"""Loading: only what can be served safely, with the facts that the API reports."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from training_ready.serving.errors import ServingError
from training_ready.serving.model import ServedModel, load_model


@pytest.fixture
def copy(release: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(release, tmp_path / "copy"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_facts_come_from_the_release(served: ServedModel) -> None:
    end = served.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert served.end_ids == frozenset(end)
    assert (served.max_total_tokens, served.max_input_tokens) == (256, 255)
    assert (served.dtype, served.device.type, served.commit, served.pipeline_tag) == (
        "float32",
        "cpu",
        None,
        None,
    )
    assert set(served.special_tokens.values()) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}


def test_the_model_card_names_the_task(copy: Path) -> None:
    (copy / "README.md").write_text("---\npipeline_tag: text-generation\n---\n# A card\n")
    assert load_model(str(copy), device="cpu").pipeline_tag == "text-generation"


def test_pickled_weights_are_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(weights, copy / "pytorch_model.bin")
    with pytest.raises(ServingError, match=r"no \*\.safetensors.*Pickled weights are never loaded"):
        load_model(str(copy), device="cpu")


def test_a_missing_weight_is_an_error_and_not_a_random_one(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ServingError, match=r"1 weights missing.*lm_head"):
        load_model(str(copy), device="cpu")


def test_code_that_comes_with_a_model_is_never_run(copy: Path) -> None:
    edit(copy / "config.json", model_type="homemade", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (copy / "evil.py").write_text(f"open({str(copy / 'ran')!r}, 'w')")
    with pytest.raises(ServingError, match="cannot be loaded"):
        load_model(str(copy), device="cpu")
    assert not (copy / "ran").exists()


def test_truncated_weights_are_an_error(copy: Path) -> None:
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ServingError, match="cannot be loaded"):
        load_model(str(copy), device="cpu")


def test_the_stored_login_is_not_sent_to_another_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["authorization"])
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    (tmp_path / "token").write_text("hf_stored")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        for token in (None, "hf_meant"):
            if token:
                monkeypatch.setenv("HF_TOKEN", token)
            with pytest.raises(ServingError, match="Check the name, HF_ENDPOINT"):
                load_model("people/tiny", endpoint=endpoint)
        server.shutdown()
    assert set(seen) == {None, "Bearer hf_meant"}


def test_an_address_of_a_hub_that_holds_a_password_is_refused_and_not_shown() -> None:
    with pytest.raises(ServingError, match=r"http://…@127\.0\.0\.1:9\)") as refused:
        load_model("people/tiny", endpoint="http://me:topsecret@127.0.0.1:9")
    assert "topsecret" not in str(refused.value)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_folder_that_is_not_there_is_not_looked_up_on_a_hub(name: str) -> None:
    with pytest.raises(ServingError, match="no such folder"):
        load_model(name)


def test_a_folder_has_no_revision(release: Path) -> None:
    with pytest.raises(ServingError, match="no revision 'main'"):
        load_model(str(release), revision="main")


def test_an_unknown_device_is_one_clear_line(release: Path) -> None:
    with pytest.raises(ServingError, match="--device toaster: not usable here"):
        load_model(str(release), device="toaster")
