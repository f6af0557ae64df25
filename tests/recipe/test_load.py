"""What a recipe says is what is read: types, bases, command line, references, names, and the text of the result."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from training_ready.recipe.faults import RecipeError
from training_ready.recipe.load import load_recipe


def trl(path: Path, *overrides: str, **environment: str) -> dict[str, Any]:
    return dict(load_recipe(path, overrides, environment=environment).trl)


# --------------------------------------------------------------------------- values
@pytest.mark.parametrize(
    ("written", "key", "value"),
    [
        ("learning_rate: 2e-5", "learning_rate", 2e-5),
        ("learning_rate: 2.0E-05", "learning_rate", 2e-5),
        ("learning_rate: '2e-5'", "learning_rate", 2e-5),
        ("learning_rate: .5", "learning_rate", 0.5),
        ("weight_decay: 0", "weight_decay", 0.0),
        ("max_length: 1_024", "max_length", 1024),
        ("max_length: null", "max_length", None),
        ("max_length: ~", "max_length", None),
        ("max_length:", "max_length", None),
        ("max_steps: -1", "max_steps", -1),
        ("save_steps: 500", "save_steps", 500),
        ("save_steps: 0.2", "save_steps", 0.2),
        ("save_steps: 1e2", "save_steps", 100),
        ("warmup_steps: 0.1", "warmup_steps", 0.1),
        ("packing: yes", "packing", True),
        ("packing: On", "packing", True),
        ("packing: off", "packing", False),
        ("packing: 'true'", "packing", True),
        ("eval_strategy: no", "eval_strategy", "no"),
        ("eval_strategy: 'no'", "eval_strategy", "no"),
        ("run_name: 2024-01-02", "run_name", "2024-01-02"),
        ("optim_args: 12:30:45", "optim_args", "12:30:45"),
        ("run_name: 007", "run_name", "007"),
        ("run_name: on", "run_name", "on"),
        ("run_name: 'null'", "run_name", "null"),
        ("pad_to_multiple_of: 8", "pad_to_multiple_of", 8),
        ("pad_to_multiple_of: auto", "pad_to_multiple_of", "auto"),
        ("include_num_input_tokens_seen: no", "include_num_input_tokens_seen", "no"),
        ("include_num_input_tokens_seen: true", "include_num_input_tokens_seen", True),
        ("report_to: none", "report_to", "none"),
        ("report_to: [tensorboard, wandb]", "report_to", ["tensorboard", "wandb"]),
        ("eos_token: <|im_end|>", "eos_token", "<|im_end|>"),
        ("lr_scheduler_kwargs: {min_lr_rate: 1e-1}", "lr_scheduler_kwargs", {"min_lr_rate": 0.1}),
        (
            "model_init_kwargs: {a: 1, b: 1e-3, c: '1', d: null, e: [true, x], f: 2024-01-01}",
            "model_init_kwargs",
            {"a": 1, "b": 1e-3, "c": "1", "d": None, "e": [True, "x"], "f": "2024-01-01"},
        ),
    ],
)
def test_each_value_has_the_type_of_its_key(
    write: Any, smallest: str, written: str, key: str, value: Any
) -> None:
    found = trl(write(smallest + written + "\n"))[key]
    assert found == value
    assert type(found) is type(value)


def test_one_word_is_a_list_of_one(write: Any, smallest: str) -> None:
    path = write(smallest + "use_peft: true\nlora_target_modules: all-linear\nrelease: {language: de}\n")
    recipe = load_recipe(path)
    assert recipe.trl["lora_target_modules"] == ["all-linear"]
    assert recipe.release.language == ["de"]


def test_the_environment_of_the_run_is_text_as_written_and_not_exported(write: Any, smallest: str) -> None:
    recipe = load_recipe(write(smallest + "env: {TR_TEST_A: false, TR_TEST_B: 010, TR_TEST_C: 1_0}\n"))
    assert recipe.env == {"TR_TEST_A": "false", "TR_TEST_B": "010", "TR_TEST_C": "1_0"}
    import os

    assert "TR_TEST_A" not in os.environ


def test_sections_have_their_defaults(write: Any) -> None:
    recipe = load_recipe(write())
    assert (recipe.data.train_split, recipe.data.eval_split, recipe.data.target_role) == (
        "train",
        None,
        "assistant",
    )
    assert (recipe.stream.overlong, recipe.stream.blocks_per_group) == ("truncate", 8)
    assert recipe.model.config is None
    assert recipe.moe.watch is True
    assert recipe.budget.max_hours is None
    assert recipe.release.language == ["en"]
    assert recipe.launch.ovh is None
    assert set(recipe.trl) == {"output_dir", "model_name_or_path"}


# --------------------------------------------------------------------------- names
@pytest.mark.parametrize(
    ("extra", "name", "output_dir"),
    [
        ("", "recipe", "runs/recipe"),
        ("run_name: mine\n", "mine", "runs/mine"),
        ("output_dir: /scratch/a/b\n", "b", "/scratch/a/b"),
        ("output_dir: out\nrun_name: mine\n", "mine", "out"),
        ("output_dir: null\n", "recipe", "runs/recipe"),
    ],
)
def test_name_and_folder(write: Any, smallest: str, extra: str, name: str, output_dir: str) -> None:
    recipe = load_recipe(write(smallest + extra))
    assert (recipe.name, str(recipe.output_dir)) == (name, output_dir)


@pytest.mark.parametrize("run_name", ["../../etc", "a/b", ".hidden"])
def test_a_name_cannot_leave_the_folder_of_runs(write: Any, run_name: str) -> None:
    with pytest.raises(RecipeError, match="run_name"):
        load_recipe(write(), [f"run_name={run_name}"])


# --------------------------------------------------------------------------- bases
def test_mappings_merge_and_lists_are_replaced(write: Any) -> None:
    write(
        "model_name_or_path: org/base\nreport_to: [a, b]\nmodel_init_kwargs: {x: 1, y: {z: 1, w: 2}}\n"
        "data: {corpus: c, train_split: t}\n",
        "bases/deep.yaml",
    )
    write("extends: deep.yaml\nseed: 1\n", "bases/middle.yaml")
    path = write(
        "extends: bases/middle.yaml\nreport_to: [c]\nmodel_init_kwargs: {y: {z: 3}}\ndata: {eval_split: val}\n"
    )
    recipe = load_recipe(path)
    assert recipe.trl["report_to"] == ["c"]
    assert recipe.trl["model_init_kwargs"] == {"x": 1, "y": {"z": 3, "w": 2}}
    assert (recipe.data.corpus, recipe.data.train_split, recipe.data.eval_split) == ("c", "t", "val")
    folder = path.parent
    assert str(recipe.origins["seed"]) == f"{folder}/bases/middle.yaml:2"
    assert str(recipe.origins["data.corpus"]) == f"{folder}/bases/deep.yaml:4"
    assert str(recipe.origins["data.eval_split"]) == f"{path}:4"
    assert str(recipe.origins["output_dir"]) == "default"


def test_later_bases_win(write: Any, smallest: str) -> None:
    write(smallest + "seed: 1\nmax_steps: 1\n", "one.yaml")
    write("seed: 2\n", "two.yaml")
    assert trl(write("extends: [one.yaml, two.yaml]\n"))["seed"] == 2
    assert trl(write("extends: [two.yaml, one.yaml]\n"))["seed"] == 1


def test_one_base_may_be_reached_twice(write: Any, smallest: str) -> None:
    write(smallest, "root.yaml")
    write("extends: root.yaml\nseed: 1\n", "left.yaml")
    write("extends: root.yaml\nmax_steps: 2\n", "right.yaml")
    found = trl(write("extends: [left.yaml, right.yaml]\n"))
    assert (found["seed"], found["max_steps"]) == (1, 2)


def test_null_over_an_inherited_value_returns_to_the_default(write: Any, smallest: str) -> None:
    write(smallest + "seed: 1\nstream: {overlong: drop}\nmoe: {watch: false}\nenv: {A: b}\n", "base.yaml")
    recipe = load_recipe(
        write("extends: base.yaml\nseed: null\nstream: {overlong: null}\nmoe: null\nenv: {A: null}\n")
    )
    assert "seed" not in recipe.trl
    assert recipe.stream.overlong == "truncate"
    assert recipe.moe.watch is True
    assert recipe.env == {}


@pytest.mark.parametrize(
    ("files", "words", "line"),
    [
        ({"recipe.yaml": "extends: recipe.yaml\n"}, "recipe.yaml -> recipe.yaml", 1),
        (
            {"recipe.yaml": "extends: b.yaml\n", "b.yaml": "seed: 1\nextends: recipe.yaml\n"},
            "recipe.yaml -> b.yaml -> recipe.yaml",
            2,
        ),
        ({"recipe.yaml": "seed: 1\nextends: none.yaml\n"}, "none.yaml: no such file", 2),
        ({"recipe.yaml": "extends: {a: b}\n"}, "expected a path", 1),
        ({"recipe.yaml": "extends: b.yaml\n", "b.yaml": "a: [\n"}, "YAML", 2),
    ],
)
def test_bases_that_cannot_be(write: Any, files: dict[str, str], words: str, line: int) -> None:
    for name, text in files.items():
        path = write(text, name)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path.parent / "recipe.yaml")
    mine = next(fault for fault in caught.value.faults if words in fault.message)
    assert mine.origin.line == line


# --------------------------------------------------------------------------- command line
@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["max_steps=10"], "max_steps", 10),
        (["--max_steps", "10"], "max_steps", 10),
        (["--max_steps=10"], "max_steps", 10),
        (["--max-steps", "10"], "max_steps", 10),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--packing"], "packing", True),
        (["--packing", "--seed", "3"], "packing", True),
        (["--packing=false"], "packing", False),
        (["run_name=a=b"], "run_name", "a=b"),
        (["output_dir=x", "run_name=a: b # c"], "run_name", "a: b # c"),
        (["report_to=[a, b]"], "report_to", ["a", "b"]),
        (['model_init_kwargs={"a": 1}'], "model_init_kwargs", {"x": 1, "a": 1}),
        (["model_init_kwargs.y.z=2"], "model_init_kwargs", {"x": 1, "y": {"z": 2}}),
        (["seed=1", "seed=2"], "seed", 2),
        (["seed=null"], "seed", None),
    ],
)
def test_the_command_line_wins(write: Any, smallest: str, words: list[str], key: str, value: Any) -> None:
    path = write(smallest + "seed: 7\nmodel_init_kwargs: {x: 1}\noutput_dir: out\n")
    recipe = load_recipe(path, words)
    assert recipe.trl.get(key) == value
    origins = {str(origin) for name, origin in recipe.origins.items() if name.startswith(key)}
    assert "command line" in origins or value is None


def test_an_entry_of_a_list(write: Any, smallest: str) -> None:
    path = write(smallest + "release: {tags: [a, b]}\nuse_peft: true\nlora_target_modules: [q, v]\n")
    recipe = load_recipe(path, ["release.tags[1]=c", "lora_target_modules[0]=k", "launch.num_processes=2"])
    assert recipe.release.tags == ["a", "c"]
    assert recipe.trl["lora_target_modules"] == ["k", "v"]
    assert recipe.launch.num_processes == 2


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("release.tags[5]=c", "has 2 entries, so there is no entry 5"),
        ("seed.x=1", "`seed` is not a mapping"),
        ("alone", "write key=value"),
        ("=5", "write key=value"),
        ("1a=5", "write key=value"),
        ("release.tags=[a", "not YAML"),
        ("extends=other.yaml", "key of files only"),
    ],
)
def test_words_that_are_no_override(write: Any, smallest: str, word: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(smallest + "seed: 7\nrelease: {tags: [a, b]}\n"), [word])
    assert message in str(caught.value)
    assert caught.value.faults[0].origin.source == "command line"


# --------------------------------------------------------------------------- references
@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("${TR_NAME}", "abc"),
        ("'x-${TR_NAME}-y'", "x-abc-y"),
        ("${TR_NAME}${TR_NAME}", "abcabc"),
        ("${TR_OTHER:-else}", "else"),
        ("${TR_NAME:-else}", "abc"),
        ("$${TR_NAME}", "${TR_NAME}"),
        ("$TR_NAME", "$TR_NAME"),
        ("'${TR_NOT:-a b}'", "a b"),
        ("${TR_EMPTY}x", "x"),
    ],
)
def test_references_read_the_environment(write: Any, smallest: str, written: str, value: str) -> None:
    path = write(smallest + f"output_dir: out\nrun_name: {written}\n")
    assert trl(path, TR_NAME="abc", TR_EMPTY="")["run_name"] == value


def test_a_reference_may_be_a_number(write: Any, smallest: str) -> None:
    assert trl(write(smallest + "max_steps: ${TR_STEPS}\n"), TR_STEPS="12")["max_steps"] == 12


# --------------------------------------------------------------------------- the resolved text
def reread(path: Path, text: str) -> Any:
    other = path.with_name("resolved-elsewhere.yaml")
    other.write_text(text, encoding="utf-8")
    return load_recipe(other, environment={})


def test_the_text_alone_gives_the_same_run(write: Any) -> None:
    write("seed: 3\nmodel_init_kwargs: {b: 1, a: '2e-5'}\nlaunch: {num_processes: 2}\n", "base.yaml")
    path = write(
        "extends: base.yaml\ndata: {corpus: c, stages: [stage1_foundation]}\nrelease: {summary: no, tags: []}\n"
        "model: {config: {model_type: llama, vocab_size: 300, bos_token_id: null}, tokenizer: {vocab_size: 300}}\n"
        "env: {A: '1', B: '${TR_B}'}\nlearning_rate: 2e-5\nchat_template_path: 'null'\n"
    )
    recipe = load_recipe(path, ["max_steps=10", "output_dir=o p"], environment={"TR_B": "$${x} ${y}"})
    again = reread(path, recipe.to_yaml())
    assert again == recipe
    assert again.sha256 == recipe.sha256
    assert again.to_yaml() == recipe.to_yaml()
    assert again.env == {"A": "1", "B": "$${x} ${y}"}


def test_the_order_of_writing_changes_nothing(write: Any) -> None:
    one = load_recipe(
        write("model_name_or_path: m\nseed: 1\ndata: {corpus: c}\nmodel_init_kwargs: {a: 1, b: 2}\n")
    )
    two = load_recipe(
        write("model_init_kwargs: {b: 2, a: 1}\ndata: {corpus: c}\nseed: 1\nmodel_name_or_path: m\n")
    )
    assert one == two
    assert one.sha256 == two.sha256
    assert one.sha256 != load_recipe(write("model_name_or_path: m\nseed: 2\ndata: {corpus: c}\n")).sha256


def test_other_readers_of_yaml_see_the_same_values(write: Any, smallest: str) -> None:
    words = [
        "no",
        "On",
        "null",
        "1e5",
        "2e-5",
        "0x1f",
        "1_000",
        "12:30",
        "2024-01-01",
        "~",
        "=",
        "<<",
        "y",
        "",
    ]
    extra = "".join(f"  k{index}: {word!r}\n" for index, word in enumerate(words))
    recipe = load_recipe(write(smallest + "model_init_kwargs:\n" + extra))
    assert yaml.safe_load(recipe.to_yaml())["model_init_kwargs"] == {
        f"k{i}": word for i, word in enumerate(words)
    }


plain_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"[a-z]{1,8}", fullmatch=True), inner)
    ),
    max_leaves=8,
)


@given(
    value=st.dictionaries(st.from_regex(r"k[a-z]{1,8}", fullmatch=True), plain_data), name=st.text(min_size=1)
)
def test_any_value_survives_the_text(tmp_path_factory: pytest.TempPathFactory, value: Any, name: str) -> None:
    from dataclasses import replace

    from training_ready.recipe.confidential import secret_in

    if secret_in(str(value)) or secret_in(name):
        return
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text("model_name_or_path: m\ndata: {corpus: c}\noutput_dir: o\n")
    recipe = load_recipe(path)
    recipe = replace(recipe, name=name, trl={**recipe.trl, "run_name": name, "model_init_kwargs": value})
    again = reread(path, recipe.to_yaml())
    assert again.trl["model_init_kwargs"] == value
    assert again.trl["run_name"] == name


def test_groups_of_trl_keys(write: Any, smallest: str) -> None:
    recipe = load_recipe(write(smallest + "seed: 1\ndtype: bfloat16\n"))
    assert recipe.trl_group("ModelConfig") == {"model_name_or_path": "org/model", "dtype": "bfloat16"}
    assert recipe.trl_group("SFTConfig") == {"seed": 1, "output_dir": "runs/recipe"}
    assert recipe.effective("lora_r") == 16
    with pytest.raises(ValueError, match="DPOConfig"):
        recipe.trl_group("DPOConfig")


def test_reading_imports_no_heavy_package(write: Any) -> None:
    code = (
        "import sys; from training_ready.recipe.load import load_recipe; from training_ready.recipe import commands; "
        f"load_recipe({str(write())!r}); "
        "print([name for name in ('torch', 'trl', 'transformers', 'numpy', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
