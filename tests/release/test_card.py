"""A card says what the run's facts say, in metadata that a hub accepts, or it is not written."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard

from training_ready.release.card import render_card, write_card
from training_ready.release.contents import ReleaseFile, release_files
from training_ready.release.facts import CardError, check_facts, load_facts
from training_ready.release.hub_server import EmbeddedHub
from training_ready.release.publish import publish_release

from .conftest import make_words

TEMPLATE = "{{ messages[0].content }}<|im_end|>\n"


def words(**changes: object) -> Any:
    return SimpleNamespace(**{**make_words(), **changes})


def render(summary: dict[str, Any], release_words: Any = None) -> str:
    return render_card(
        check_facts(summary),
        release_words or words(),
        title="tiny",
        chat_template=TEMPLATE,
        end_of_turn={2: "<|im_end|>"},
        special_tokens={"eos_token": "<|im_end|>", "pad_token": "<pad>"},
        files=[ReleaseFile("model.safetensors", 123456, "c" * 64)],
    )


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every field of the summary, the first of each list."""
    if isinstance(value, dict):
        found = [] if path[-1:] in (("splits",), ("rejected",), ("versions",)) else list(value)
        return [path, *(leaf for key in found for leaf in leaves(value[key], (*path, key)))]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [path, *leaves(value[0], (*path, 0))]
    return [path]


def test_every_field_of_the_summary_is_required_by_name(summary: dict[str, Any]) -> None:
    fields = [path for path in leaves(summary) if path and path[-1] != 0]
    assert len(fields) > 50
    for path in fields:
        broken = copy.deepcopy(summary)
        place = broken
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]
        with pytest.raises(CardError, match=re.escape(".".join(map(str, path))) + r": Field required"):
            check_facts(broken)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("loss", "last"), float("nan"), "loss.last"),
        (("loss", "last"), "2.3", "loss.last"),
        (("steps",), -1, "steps"),
        (("data", "sources", 0, "kept"), 1199, "1234 records in, but 1199 kept + 34 rejected"),
        (("moe", "layers", 1, "load"), [0.5, 0.4], "sum to 0.9"),
        (("data", "manifest_sha256"), "abc", "data.manifest_sha256"),
        (("data", "target_role"), "system", "data.target_role"),
        (("data", "sources"), [], "data.sources"),
        (("versions",), {"torch": "2.13.0"}, "training-ready is not among them"),
        (("pictures",), ["loss.png"], "expert_load.png missing"),
    ],
)
def test_a_wrong_value_is_refused(
    summary: dict[str, Any], path: tuple[Any, ...], value: Any, said: str
) -> None:
    place = summary
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(CardError, match=re.escape(said)):
        check_facts(summary)


def test_the_numbers_of_the_run_stand_in_the_card(summary: dict[str, Any]) -> None:
    text = render(summary)
    for expected in (
        "4,321 steps, seed 17",
        "3,456,789, of which trained 3,456,788",
        "| a\\|b | CC-BY-4.0 | 1,234 | 1,200 | empty 33, exact_duplicate 1 |",
        "train 611, val 67 records",
        "| Packs | 97, filled to 98.8% |",
        "198,765",
        "| first logged step | 7.654 |",
        "| last logged step | 2.345 |",
        "| 0 | 40.0% | 30.0% | 20.0% | 10.0% | 1.28 |",
        "an even load is 25.0%",
        "1.01 first, 1.002 last",
        "1 h 02 min",
        "CPU only; processor x86_64, 15.5 GiB",
        "![expert_load.png](expert_load.png)",
        "`<|im_end|>` (id 2)",
        "| model.safetensors | 123,456 | `" + "c" * 64,
        "b" * 64,
        "learning_rate: 0.00123",
        "Special tokens: eos_token `<|im_end|>`, pad_token `<pad>`.",
        "Not a medical device",
        "Crisis behaviour: not evaluated by this run (n = 0)",
        "| a\\|b | not recorded in the manifest | not recorded in the manifest |",
        "(1.033 h)",
        "Energy: unmeasured.",
        "Benchmarks: not evaluated.",
        "| TGI 3.3.7, through transformers 4.51.0 | not verified | not measured |  |",
    ):
        assert expected in text


def test_merged_adapters_are_no_part_of_the_parameters(summary: dict[str, Any]) -> None:
    summary["model"] |= {"parameters_merged": 40_000, "parameters_trainable": 42_000}
    expected = "3,456,789; trained were 42,000, 40,000 of them in adapters that are merged into these |"
    assert expected in render(summary)


def test_the_metadata_is_what_a_hub_indexes(summary: dict[str, Any]) -> None:
    data = ModelCard(render(summary)).data
    assert data.license == "apache-2.0"
    assert data.language == ["en", "fr"]
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert {"mixture-of-experts", "calm"} <= set(data.tags or [])
    assert data.base_model is None
    assert data.datasets is None


def test_the_base_model_is_named_when_there_is_one(summary: dict[str, Any], tmp_path: Path) -> None:
    summary["model"] |= {"base_model": "org/base-12b", "base_revision": "f" * 40}
    text = render(summary)
    assert ModelCard(text).data.base_model == "org/base-12b"
    assert f"org/base-12b at revision {'f' * 40}" in text
    assert "Trained from random weights" not in text
    summary["model"] |= {"base_model": str(tmp_path), "base_revision": None}
    text = render(summary)
    assert ModelCard(text).data.base_model is None
    assert str(tmp_path) not in text


def test_a_run_that_ended_before_its_first_pass_says_so(summary: dict[str, Any]) -> None:
    part = {"name": "data", "packs": 8, "rows": 9, "tokens": 99, "learned_tokens": 9}
    summary["tokens"] |= {"trained_parts": [{**part, "epochs": None}], "untokenised_blocks": 31}
    card = render(summary)
    assert "| data | 9 | 99 | 9 | not counted |" in card
    assert "| Row groups of the corpus that were not tokenised when the run ended | 31 |" in card
    summary["tokens"] |= {"trained_parts": [{**part, "epochs": 0.25}], "untokenised_blocks": 0}
    assert "| data | 9 | 99 | 9 | 0.25 |" in render(summary)
    assert "not tokenised" not in render(summary)


def test_a_dense_model_has_no_expert_table(summary: dict[str, Any]) -> None:
    summary["moe"] = None
    summary["loss"]["eval"] = 3.21
    text = render(summary)
    assert "Expert load" not in text
    assert "mixture-of-experts" not in text
    assert "| evaluation split | 3.21 |" in text
    assert "No evaluation split was used" not in text


def test_many_experts_are_summed_up(summary: dict[str, Any]) -> None:
    load = [0.5 / 31] * 31 + [0.5]
    summary["moe"]["layers"] = [{"layer": 7, "load": load, "entropy": 2.5}]
    assert "| 7 | 32 | 1.6% | 50.0% | 2.5 |\n\nAuxiliary" in render(summary)


def test_the_recipe_reads_back_from_its_fence(summary: dict[str, Any]) -> None:
    text = render(summary)
    fenced = re.search(r"^(`{4,})yaml\n(.*?)\n\1$", text, re.MULTILINE | re.DOTALL)
    assert fenced is not None
    assert yaml.safe_load(fenced.group(2)) == yaml.safe_load(summary["recipe"]["resolved"])


@pytest.mark.parametrize("name", ["license", "summary", "intended_use", "limits"])
def test_a_text_that_the_recipe_owes_is_named(summary: dict[str, Any], name: str) -> None:
    with pytest.raises(CardError, match=rf"release\.{name}"):
        render(summary, words(**{name: None}))


def test_a_secret_never_gets_into_a_card(summary: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVH_S3_SECRET_ACCESS_KEY", "s3cr3t-of-the-bucket")
    summary["recipe"]["resolved"] = "note: s3cr3t-of-the-bucket\n"
    with pytest.raises(CardError, match="OVH_S3_SECRET_ACCESS_KEY") as refused:
        render(summary)
    assert "s3cr3t" not in str(refused.value)
    summary["recipe"]["resolved"] = "note: hf_" + "a1B2" * 9 + "\n"
    with pytest.raises(CardError, match="looks like a secret"):
        render(summary)


def test_a_run_that_has_not_finished(tmp_path: Path) -> None:
    with pytest.raises(CardError, match="has not finished"):
        load_facts(tmp_path)


def test_a_written_card_passes_the_hub(
    hub: EmbeddedHub, api: HfApi, release: Path, run_folder: Callable[[], Path]
) -> None:
    (release / "README.md").unlink()
    run = run_folder()
    write_card(load_facts(run), words(), run, release, title="tiny")
    hashes = {file.path: file.sha256 for file in release_files(release)}
    text = (release / "README.md").read_text()
    for name in ("model.safetensors", "expert_load.png", "tokenizer.json"):
        assert f"| {name} | " in text
        assert hashes[name] in text
    publish_release(release, "me/tiny", endpoint=hub.endpoint_url)
    info = api.repo_info("me/tiny")
    assert (info.card_data.license, info.pipeline_tag) == ("apache-2.0", "text-generation")


def test_a_picture_that_is_not_there_stops_the_card(
    summary: dict[str, Any], release: Path, run_folder: Callable[[], Path]
) -> None:
    (release / "README.md").unlink()
    for picture in ("missing.png", "../runs/tiny-run/loss.png"):
        summary["pictures"] = ["loss.png", "expert_load.png", picture]
        run = run_folder()
        with pytest.raises(CardError, match="pictures"):
            write_card(load_facts(run), words(), run, release, title="tiny")
    assert not (release / "README.md").exists()
