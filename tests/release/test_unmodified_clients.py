"""Programs that know nothing of this package and find the hub by HF_ENDPOINT alone."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from training_ready.release.hub_server import EmbeddedHub
from training_ready.release.place_bucket import BucketPlace
from training_ready.release.place_folder import FolderPlace
from training_ready.release.places import Place
from training_ready.release.targets.pinned import cache_folder

PUSH_AND_RELOAD = """
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

words = {"<unk>": 0, "<pad>": 1, "<|im_end|>": 2, "hello": 3, "there": 4}
backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="<|im_end|>"
)
tokenizer.chat_template = "{% for m in messages %}{{ m.content }} <|im_end|> {% endfor %}"
torch.manual_seed(3)
model = MixtralForCausalLM(MixtralConfig(
    vocab_size=5, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
)).eval()
model.push_to_hub("me/mixtral", private=True)
tokenizer.push_to_hub("me/mixtral")

again = AutoModelForCausalLM.from_pretrained("me/mixtral").eval()
words = AutoTokenizer.from_pretrained("me/mixtral")
text = words.apply_chat_template([{"role": "user", "content": "hello there"}], tokenize=False)
assert text == "hello there <|im_end|> ", text
ids = words(text, return_tensors="pt").input_ids
with torch.no_grad():
    assert torch.equal(model(ids).logits, again(ids).logits)
print("same logits for", ids.tolist())
"""

CARD = """
from huggingface_hub import ModelCard, create_repo
create_repo("me/card")
ModelCard("---\\nlicense: mit\\nlibrary_name: transformers\\ntags:\\n- calm\\n---\\n# Hi").push_to_hub("me/card")
assert ModelCard.load("me/card").data.license == "mit"
try:
    ModelCard("---\\nlicense:\\n  name: mit\\n---\\n# Hi").push_to_hub("me/card")
except ValueError as error:
    print("refused:", error)
"""


def run(hub: EmbeddedHub, home: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **hub.environment()}
    environment.setdefault("OMP_NUM_THREADS", "1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def test_a_mixtral_pushed_by_transformers_comes_back_with_its_logits(
    hub: EmbeddedHub, tmp_path: Path
) -> None:
    done = run(hub, tmp_path / "home", sys.executable, "-c", PUSH_AND_RELOAD)
    assert "same logits for [[3, 4, 2]]" in done.stdout
    api = HfApi(endpoint=hub.endpoint_url, token=False)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(api.list_repo_files("me/mixtral"))
    assert api.repo_info("me/mixtral").private is True


def test_model_card_push_and_refusal(tmp_path: Path) -> None:
    with EmbeddedHub(tmp_path / "hub", token="a-token") as hub:
        done = run(hub, tmp_path / "home", sys.executable, "-c", CARD)
        assert "'license' must be" in done.stdout
        info = HfApi(endpoint=hub.endpoint_url, token="a-token").repo_info("me/card")
    assert (info.card_data.license, info.library_name, info.tags) == ("mit", "transformers", ["calm"])


def test_the_hf_command_line(hub: EmbeddedHub, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.bin").write_bytes(os.urandom(10_000))
    hf = str(Path(sys.executable).with_name("hf"))
    run(hub, tmp_path / "home", hf, "upload", "me/cli", str(tmp_path / "data"))
    run(hub, tmp_path / "home", hf, "download", "me/cli", "--local-dir", str(tmp_path / "copy"))
    assert (tmp_path / "copy" / "a.bin").read_bytes() == (tmp_path / "data" / "a.bin").read_bytes()


@pytest.mark.slow  # a process for each command
def test_more_of_the_hf_command_line(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(os.urandom(10_000))
    hf = str(Path(sys.executable).with_name("hf"))
    with EmbeddedHub(tmp_path / "hub", token="a-token") as hub:

        def say(*words: str) -> str:
            return run(hub, tmp_path / "home", hf, *words).stdout

        assert "local" in say("auth", "whoami")
        say("repos", "create", "me/cli", "--private")
        say("upload", "me/cli", str(tmp_path / "a.bin"), "weights/a.bin")
        say("repos", "branch", "create", "me/cli", "step-000001")
        say("repos", "tag", "create", "me/cli", "v1")
        assert "v1" in say("repos", "tag", "list", "me/cli")
        say("upload", "me/cli", str(tmp_path / "a.bin"), "b.bin", "--revision", "step-000001")
        api = HfApi(endpoint=hub.endpoint_url, token="a-token")
        assert api.list_repo_files("me/cli", revision="v1") == ["weights/a.bin"]
        assert api.list_repo_files("me/cli", revision="step-000001") == ["b.bin", "weights/a.bin"]
        assert "me/cli" in say("models", "ls", "--format", "json")
        say("repos", "delete", "me/cli", "--yes")
        assert not api.repo_exists("me/cli")


OLD_CLIENT = """
import os, sys
from pathlib import Path
from huggingface_hub import CommitOperationAdd, HfApi, __version__, hf_hub_download, snapshot_download
from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

assert __version__ == "0.30.1", __version__
api, folder = HfApi(), Path(sys.argv[1])
api.create_repo("me/old", private=True)
api.create_repo("me/old", exist_ok=True)
api.upload_folder(repo_id="me/old", folder_path=folder)
api.create_branch("me/old", branch="step-000123")
api.create_tag("me/old", tag="v1")
head = api.repo_info("me/old", revision="step-000123").sha
api.create_commit(
    "me/old", [CommitOperationAdd("b.txt", b"two")], commit_message="b", revision="step-000123", parent_commit=head
)
try:
    api.create_commit(
        "me/old", [CommitOperationAdd("c", b"3")], commit_message="c", revision="step-000123", parent_commit=head
    )
    raise SystemExit("a commit on an old parent was accepted")
except HfHubHTTPError as error:
    assert error.response.status_code == 412, error
assert {ref.name for ref in api.list_repo_refs("me/old").branches} == {"main", "step-000123"}
assert [entry.path for entry in api.list_repo_tree("me/old")] == ["sub", "weights.bin"]
assert api.get_paths_info("me/old", ["weights.bin"])[0].lfs.size == 200_000
assert len(api.list_repo_commits("me/old")) == 2
assert [model.id for model in api.list_models()] == ["me/old"]
for wanted, attempt in (
    (RepositoryNotFoundError, lambda: api.repo_info("me/none")),
    (RevisionNotFoundError, lambda: api.repo_info("me/old", revision="none")),
    (EntryNotFoundError, lambda: hf_hub_download("me/old", "none.txt")),
):
    try:
        attempt()
        raise SystemExit(f"no {wanted.__name__}")
    except wanted:
        pass
copy = Path(snapshot_download("me/old", revision="v1"))
for name in ("weights.bin", "sub/a.txt"):
    assert (copy / name).read_bytes() == (folder / name).read_bytes()
api.upload_large_folder(repo_id="me/old", repo_type="model", folder_path=folder, revision="main", print_report=False)
api.delete_file("weights.bin", "me/old")
api.delete_branch("me/old", branch="step-000123")
print("all of it works")
"""


@pytest.fixture(scope="module")
def old_python() -> Path:
    """An interpreter with huggingface-hub 0.30.1, TGI's; built once from the package index, and kept."""
    folder = (
        cache_folder() / f"huggingface-hub-0.30.1-{hashlib.sha256(sys.version.encode()).hexdigest()[:12]}"
    )
    if not (folder / "env" / "bin" / "python").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=folder.parent))
        subprocess.run([sys.executable, "-m", "venv", building / "env"], check=True)
        pip = [
            building / "env" / "bin" / "python",
            "-m",
            "pip",
            "install",
            "--quiet",
            "huggingface-hub==0.30.1",
        ]
        subprocess.run(pip, check=True)
        building.rename(folder)
    return folder / "env" / "bin" / "python"


@pytest.mark.slow  # the first time it builds an environment
@pytest.mark.parametrize("storage", ["folder", "bucket"])
def test_the_client_of_tgi(
    old_python: Path, tmp_path: Path, storage: str, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "weights.bin").write_bytes(b"\0" + os.urandom(199_999))
    (tmp_path / "data" / "sub" / "a.txt").write_text("grüße")
    if storage == "folder":
        place: Place = FolderPlace(tmp_path / "hub")
    else:
        place = BucketPlace(request.getfixturevalue("moto_store"), "hub")
    with EmbeddedHub(place, token="a-token") as hub:
        done = run(hub, tmp_path / "home", str(old_python), "-I", "-c", OLD_CLIENT, str(tmp_path / "data"))
        assert "all of it works" in done.stdout
