"""Real data the whole way: a published CSV → corpus → 60 steps → release → hub → service → an answer."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import InferenceClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from training_ready.corpus.manifest import Manifest
from training_ready.storage.objects import ObjectStore
from training_ready.storage.settings import StorageSettings
from training_ready.stream.render import ChatRenderer
from training_ready.stream.shards import read_corpus_shard

FOLDER = os.environ.get("TRAINING_READY_REAL_DATA")
pytestmark = pytest.mark.skipif(
    FOLDER is None, reason="set TRAINING_READY_REAL_DATA to the folder that holds counsel_chat/"
)
HERE = Path(__file__).parent
QUESTION = "Since my father died I cannot concentrate at work. Is that normal?"
REPOSITORY = "journeys/counsel-chat"


@pytest.fixture(scope="module")
def run(done: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished and published run."""
    folder = tmp_path_factory.mktemp("counsel") / "run"
    csv = Path(str(FOLDER)) / "counsel_chat" / "20200325_counsel_chat.csv"
    staged = folder.parent / "counsel_chat.csv"
    staged.symlink_to(csv)
    done("training-ready", "data", "upload", staged.resolve(), "--to", "acquired")
    spec = (HERE.parent / "corpus" / "counsel_chat.yaml").read_text(encoding="utf-8")
    ours = folder.parent / "spec.yaml"
    ours.write_text(spec.replace("acquired/counsel_chat.csv", f"acquired/{csv.name}"), encoding="utf-8")
    done("training-ready", "data", "build", ours)
    launch = ("accelerate", "launch", "--config_file", "accelerate_configs/cpu.yaml", "scripts/run_sft.py")
    done(*launch, HERE / "counsel_chat_recipe.yaml", f"output_dir={folder}")
    done("training-ready", "release", "build", folder, folder.parent / "release")
    done("training-ready", "release", "publish", folder.parent / "release", REPOSITORY)
    return folder


@pytest.fixture(scope="module")
def trained(run: Path) -> tuple[Any, Any]:
    """Model and tokenizer as the last checkpoint holds them."""
    checkpoint = run / "checkpoint-60"
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval(), AutoTokenizer.from_pretrained(checkpoint)


def test_the_loss_falls(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["loss"]["last"] < summary["loss"]["first"] - 0.5
    [source] = summary["data"]["sources"]
    assert source["records_in"] == 2129 == source["kept"] + sum(source["rejected"].values())


def test_the_published_model_is_the_trained_one(
    run: Path, trained: tuple[Any, Any], machine: dict[str, str]
) -> None:
    from training_ready.release.connection import hub_api

    model, tokenizer = trained
    with hub_api(machine["HF_ENDPOINT"], None) as api:
        folder = api.snapshot_download(REPOSITORY, cache_dir=run.parent / "download")
    again, again_tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    ids = tokenizer(QUESTION * 5, return_tensors="pt").input_ids
    assert again_tokenizer(QUESTION * 5, return_tensors="pt").input_ids.tolist() == ids.tolist()
    with torch.no_grad():
        assert (model(ids).logits - again(ids).logits).abs().max() <= 1e-5
    card = (Path(folder) / "README.md").read_text(encoding="utf-8")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    consent = "public posts; their writers were not asked"
    for fact in (
        summary["data"]["manifest_sha256"],
        summary["recipe"]["resolved"].splitlines()[0],
        "mit",
        consent,
    ):
        assert fact in card
    assert {"loss.png", "expert_load.png"} <= {path.name for path in Path(folder).iterdir()}


def test_the_service_gives_the_greedy_answer_of_the_trained_model(
    trained: tuple[Any, Any], serving: Callable[[str], AbstractContextManager[str]]
) -> None:
    model, tokenizer = trained
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")

    def generated(**options: float) -> str:
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=40, do_sample=False, **options)
        return str(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))

    with serving(REPOSITORY) as url:
        client = InferenceClient(model=url, token="none")
        asked = {"max_new_tokens": 40, "do_sample": False, "return_full_text": False}
        chat = client.chat_completion(messages, max_tokens=40, temperature=0)
        plain = client.text_generation(prompt, **asked)
        # So small a model repeats itself; with a penalty on that, forty different tokens are compared.
        varied = client.text_generation(prompt, **asked, repetition_penalty=1.5)
        streamed = "".join(client.text_generation(prompt, **asked, repetition_penalty=1.5, stream=True))
    assert chat.choices[0].message.content == plain == generated()
    assert varied == generated(repetition_penalty=1.5)
    assert streamed.replace("<|im_end|>", "") == varied
    assert len(set(varied.split())) > 5


def test_labels_are_the_therapists_turns_and_their_end(
    trained: tuple[Any, Any], machine: dict[str, str]
) -> None:
    _, tokenizer = trained
    store = ObjectStore(StorageSettings.from_environment(machine, dotenv=False))
    manifest = Manifest.load(store, "final_dataset/counsel_chat/manifest.json")
    renderer = ChatRenderer(tokenizer, "assistant")
    batches = read_corpus_shard(store, manifest.shards_of("train")[0], ["messages"])
    for record in islice((record for batch in batches for record in batch), 300):
        rendered = renderer.render(record["messages"])
        answers = [m["content"] + "<|im_end|>" for m in record["messages"] if m["role"] == "assistant"]
        assert tokenizer.decode(rendered.input_ids[rendered.learned].tolist()) == "".join(answers)


def test_no_therapist_is_named(run: Path, machine: dict[str, str]) -> None:
    store = ObjectStore(StorageSettings.from_environment(machine, dotenv=False))
    manifest = Manifest.load(store, "final_dataset/counsel_chat/manifest.json")
    for shard in manifest.shards:
        for batch in read_corpus_shard(store, shard, ["metadata"]):
            for record in batch:
                assert not re.search(r"counselchat\.com|LCSW", record["metadata"])
