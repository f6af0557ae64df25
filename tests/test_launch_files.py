"""Every shipped recipe, topology and DeepSpeed file, read by the code that reads it in a run. No GPU.

What a machine without a GPU cannot show: that a topology's processes start and shard. FSDP2 and DeepSpeed become plain
data parallelism on a processor, so these tests stop where the first tensor would be placed: at the environment that
``accelerate launch`` hands to its processes, the plugins that transformers builds from it, and DeepSpeed's own reading
of the completed configuration. DeepSpeed sees one process there; its check that a global batch equals micro batch x
accumulation x processes is therefore not exercised for more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]
TOPOLOGIES = sorted(REPOSITORY.glob("accelerate_configs/*.yaml"))
DEEPSPEED = sorted(REPOSITORY.glob("deepspeed_configs/*.json"))
RECIPES = sorted(REPOSITORY.glob("recipes/*.yaml"))
ZERO = [path for path in TOPOLOGIES if path.stem.startswith("zero")]


def by_name(paths: list[Path]) -> pytest.MarkDecorator:
    """One case for each file."""
    return pytest.mark.parametrize("path", paths, ids=[path.stem for path in paths])


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in the files are relative to the repository, as they are in a run."""
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture
def needs_deepspeed() -> None:
    pytest.importorskip(
        "deepspeed", reason="DeepSpeed is the extra `gpu`; without it its own reader cannot be asked"
    )


def test_there_are_files_to_test() -> None:
    assert {path.stem for path in TOPOLOGIES} >= {
        "cpu",
        "single_gpu",
        "ddp",
        "fsdp2",
        "zero2",
        "zero3",
        "zero3_moe",
    }
    assert {path.stem for path in DEEPSPEED} >= {"zero2", "zero3", "zero3_offload", "zero3_moe"}
    assert {path.stem for path in RECIPES} >= {"quickstart", "sft", "moe"}


# --------------------------------------------------------------------------- accelerate
LAUNCHER_VARIABLES = re.compile(r"ACCELERATE_|FSDP_|CUDA_VISIBLE_DEVICES")


def launched(words: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """What ``accelerate launch <words>`` would run, up to the process itself: its arguments and environment."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import (
        prepare_deepspeed_cmd_env,
        prepare_multi_gpu_env,
        prepare_simple_launcher_cmd_env,
    )

    args, file, precision_from_file = _validate_launch_command(launch_command_parser().parse_args(words))
    if args.use_deepspeed:
        fields = [*file.deepspeed_config, *(["mixed_precision"] if precision_from_file else [])]
        args.deepspeed_fields_from_accelerate_config = ",".join(fields)
        environment = prepare_deepspeed_cmd_env(args)[1]
    elif args.use_fsdp or args.multi_gpu:
        environment = prepare_multi_gpu_env(args)
    else:
        environment = prepare_simple_launcher_cmd_env(args)[1]
    return args, {name: value for name, value in environment.items() if LAUNCHER_VARIABLES.match(name)}


def launched_with(path: Path, *flags: str) -> tuple[argparse.Namespace, dict[str, str]]:
    return launched(["--config_file", str(path), *flags, "scripts/run_sft.py", "recipes/sft.yaml"])


@by_name(TOPOLOGIES)
def test_accelerate_reads_every_topology(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert config.num_processes == written["num_processes"]
    args, environment = launched_with(path)
    assert args.num_processes == written["num_processes"]
    assert environment["ACCELERATE_MIXED_PRECISION"] == written.get("mixed_precision", "no")


def test_a_topology_with_a_wrong_key_is_refused(tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(TOPOLOGIES[0].read_text(encoding="utf-8") + "num_procesess: 2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="num_procesess"):
        load_config_from_file(str(wrong))


def test_the_processor_topology_hides_the_gpu_and_the_single_one_hides_the_others() -> None:
    assert launched_with(REPOSITORY / "accelerate_configs/cpu.yaml")[1]["ACCELERATE_USE_CPU"] == "True"
    assert launched_with(REPOSITORY / "accelerate_configs/single_gpu.yaml")[1]["CUDA_VISIBLE_DEVICES"] == "0"


def test_fsdp2_is_what_its_file_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import StateDictType
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    _, environment = launched_with(REPOSITORY / "accelerate_configs/fsdp2.yaml")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type is StateDictType.SHARDED_STATE_DICT
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.transformer_cls_names_to_wrap is None  # the model's own _no_split_modules
    assert plugin.cpu_ram_efficient_loading is True
    assert plugin.activation_checkpointing is False  # the recipe's; both at once is an error of the Trainer


def test_two_processes_on_a_processor_need_torchrun(tmp_path: Path) -> None:
    """The header of cpu.yaml warns of accelerate's single process. If this fails, accelerate was mended: correct it."""
    probe = tmp_path / "probe.py"
    probe.write_text(
        # One write for a line: with PYTHONUNBUFFERED set, two processes would mix the words of print.
        "import os\nfrom accelerate import Accelerator\nstate = Accelerator()\n"
        "os.write(1, f'rank {state.process_index} of {state.num_processes}\\n'.encode())\n",
        encoding="utf-8",
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(variable, None)

    def ranks(*command: str) -> list[str]:
        run = subprocess.run(
            [sys.executable, "-m", *command, str(probe)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=True,
        )
        return sorted(re.findall(r"rank \d+ of \d+", run.stdout))

    config = str(REPOSITORY / "accelerate_configs" / "cpu.yaml")
    launch = ("accelerate.commands.launch", "--config_file", config, "--cpu", "--num_processes", "2")
    assert ranks(*launch) == ["rank 0 of 1"]
    torchrun = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    assert ranks(*torchrun) == ["rank 0 of 2", "rank 1 of 2"]


# --------------------------------------------------------------------------- DeepSpeed
@pytest.fixture
def clean_state() -> Iterator[None]:
    """Puts back what building training arguments changes for the whole process."""
    yield
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)


def arguments(tmp_path: Path, **keys: Any) -> Any:
    """TRL's arguments on a processor. bf16 stays on: only the device is refused without a GPU, not the precision."""
    from trl import SFTConfig

    given = {
        "output_dir": str(tmp_path),
        "report_to": "none",
        "activation_checkpointing": True,
        "use_cpu": True,
    }
    return SFTConfig(**{**given, **keys})


def completed(environment: Mapping[str, str], tmp_path: Path, patch: pytest.MonkeyPatch, model: Any) -> Any:
    """The plugin with every "auto" filled in, as transformers' Trainer does it before DeepSpeed reads the result."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    for name, value in environment.items():
        patch.setenv(name, value)
    args = arguments(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=5, bf16=True
    )
    plugin = args.deepspeed_plugin
    plugin.hf_ds_config = HfTrainerDeepSpeedConfig(plugin.hf_ds_config.config)
    plugin.hf_ds_config.trainer_config_process(args)
    plugin.hf_ds_config.trainer_config_finalize(args, model, args.max_steps)
    return plugin


@pytest.fixture(scope="module")
def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    return MixtralForCausalLM(
        MixtralConfig(vocab_size=128, num_key_value_heads=2, num_local_experts=4, **sizes)
    )


def json_of(path: Path) -> Path:
    """The DeepSpeed file that a topology points at."""
    file: str = yaml.safe_load(path.read_text(encoding="utf-8"))["deepspeed_config"]["deepspeed_config_file"]
    return REPOSITORY / file


CASES: list[tuple[Path, list[str]]] = [(path, []) for path in ZERO] + [
    (REPOSITORY / "accelerate_configs" / f"{name}.yaml", ["deepspeed_configs/zero3_offload.json"])
    for name in ("zero3", "zero3_moe")
]


def test_every_deepspeed_file_is_reached_by_a_case() -> None:
    assert {json_of(path) for path in ZERO} | {REPOSITORY / "deepspeed_configs/zero3_offload.json"} == set(
        DEEPSPEED
    )


@pytest.mark.usefixtures("needs_deepspeed", "clean_state")
@pytest.mark.parametrize(
    ("path", "other"), CASES, ids=[path.stem + "+offload" * bool(o) for path, o in CASES]
)
def test_deepspeed_reads_what_a_run_would_give_it(
    path: Path, other: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixtral: Any
) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    flags = ["--deepspeed_config_file", *other] if other else []
    _, environment = launched_with(path, *flags)
    plugin = completed(environment, tmp_path, monkeypatch, mixtral)
    assert "auto" not in json.dumps(plugin.hf_ds_config.config)
    read = DeepSpeedConfig(plugin.hf_ds_config.config)
    zero = read.zero_config
    assert read.bfloat16_config.enabled
    assert read.gradient_clipping == 1.0
    assert (read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps, read.train_batch_size) == (
        2,
        3,
        6,
    )
    assert zero.stage == (2 if path.stem == "zero2" else 3)
    assert zero.overlap_comm
    assert (zero.offload_optimizer is not None) == bool(other)
    if zero.stage == 3:
        assert zero.gather_16bit_weights_on_model_save
        assert plugin.zero3_init_flag
        hidden = mixtral.config.hidden_size
        assert (zero.reduce_bucket_size, zero.param_persistence_threshold) == (hidden**2, 10 * hidden)


@pytest.mark.usefixtures("needs_deepspeed", "clean_state")
@pytest.mark.parametrize("with_lora", [False, True])
def test_both_locks_mark_every_sparse_block(
    with_lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixtral: Any
) -> None:
    import copy

    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.utils import get_z3_leaf_modules
    from deepspeed.utils.z3_leaf_module import apply_zero_leaf_module_config
    from peft import LoraConfig, get_peft_model

    _, environment = launched_with(REPOSITORY / "accelerate_configs/zero3_moe.yaml")
    plugin = completed(environment, tmp_path, monkeypatch, mixtral)
    config = DeepSpeedConfig(plugin.hf_ds_config.config).zero_config.leaf_module
    for mark in (plugin.set_moe_leaf_modules, lambda model: apply_zero_leaf_module_config(model, config)):
        model = copy.deepcopy(mixtral)
        if with_lora:
            model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
        mark(model)
        assert [type(module).__name__ for module in get_z3_leaf_modules(model)] == [
            "MixtralSparseMoeBlock"
        ] * 3


@pytest.mark.usefixtures("needs_deepspeed", "clean_state")
def test_a_dense_model_is_refused_by_the_moe_topology(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixtral: Any
) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    dense = MistralForCausalLM(MistralConfig(vocab_size=128, num_key_value_heads=2, **sizes))
    _, environment = launched_with(REPOSITORY / "accelerate_configs/zero3_moe.yaml")
    plugin = completed(environment, tmp_path, monkeypatch, dense)
    with pytest.raises(Exception, match="MixtralSparseMoeBlock"):  # accelerate raises a bare Exception
        plugin.set_moe_leaf_modules(dense)


def test_the_leaf_modules_are_those_of_every_family_we_know() -> None:
    from training_ready.moe.families import FAMILIES

    for name in ("zero3_moe", "zero3_offload"):
        zero = json.loads((REPOSITORY / f"deepspeed_configs/{name}.json").read_text(encoding="utf-8"))[
            "zero_optimization"
        ]
        assert set(zero["leaf_module"]["classes"]) == {layout.block_class for layout in FAMILIES.values()}


@pytest.mark.usefixtures("needs_deepspeed", "clean_state")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"zero_optimization": {"stage": 3, "overlap_com": True}}, "overlap_com"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4"),
        ({"bf16": {"enabled": False}}, "bf16.enabled=False"),
    ],
)
def test_a_wrong_deepspeed_file_is_noticed(
    change: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixtral: Any
) -> None:
    """The tests above could fail: the same way with a misspelt key, or a number that contradicts the recipe's."""
    from deepspeed.runtime.config import DeepSpeedConfig

    config = json.loads((REPOSITORY / "deepspeed_configs/zero3.json").read_text(encoding="utf-8"))
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps({**config, **change}), encoding="utf-8")
    flags = ["--deepspeed_config_file", str(wrong)]
    _, environment = launched_with(REPOSITORY / "accelerate_configs/zero3.yaml", *flags)
    with pytest.raises(ValueError, match=re.escape(said)):
        DeepSpeedConfig(completed(environment, tmp_path, monkeypatch, mixtral).hf_ds_config.config)


@pytest.mark.usefixtures("needs_deepspeed", "clean_state")
def test_precision_in_a_deepspeed_topology_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixtral: Any
) -> None:
    """Why the zero files have no ``mixed_precision``."""
    text = (REPOSITORY / "accelerate_configs/zero3.yaml").read_text(encoding="utf-8")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(text + "mixed_precision: bf16\n", encoding="utf-8")
    _, environment = launched_with(wrong)
    with pytest.raises(ValueError, match="mixed_precision"):
        completed(environment, tmp_path, monkeypatch, mixtral)


# --------------------------------------------------------------------------- recipes
@by_name(RECIPES)
def test_every_recipe_is_read_by_us(path: Path) -> None:
    from training_ready.recipe.load import load_recipe

    load_recipe(path, environment={})


@pytest.mark.usefixtures("clean_state")
@by_name(RECIPES)
def test_every_recipe_is_read_by_trl_without_a_warning(path: Path, tmp_path: Path) -> None:
    from trl import ModelConfig, SFTConfig

    from training_ready.recipe.load import load_recipe

    keys = load_recipe(path, environment={}).trl
    known = {kind: {field.name for field in dataclasses.fields(kind)} for kind in (SFTConfig, ModelConfig)}
    assert set(keys) <= known[SFTConfig] | known[ModelConfig]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        given = {name: value for name, value in keys.items() if name in known[SFTConfig]}
        read = arguments(tmp_path, **given)
        model = ModelConfig(**{name: value for name, value in keys.items() if name in known[ModelConfig]})
    for name in set(keys) - {
        "output_dir",
        "use_cpu",
        "report_to",
    }:  # ours here, and a text that becomes a list
        assert getattr(read if name in known[SFTConfig] else model, name) == keys[name], name


@by_name(RECIPES)
def test_a_recipe_names_a_topology_that_ships(path: Path) -> None:
    from training_ready.recipe.load import load_recipe

    launch = load_recipe(path, environment={}).launch
    if launch.accelerate_config is None:
        pytest.skip("this recipe leaves the topology to the command line")
    topology = REPOSITORY / "accelerate_configs" / f"{launch.accelerate_config}.yaml"
    written = yaml.safe_load(topology.read_text(encoding="utf-8"))
    assert launch.num_processes in (None, written["num_processes"])


# --------------------------------------------------------------------------- headers
def header(path: Path) -> str:
    """The comment at the top of a file, without its signs."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end])


def commands(text: str) -> list[list[str]]:
    """Every full ``accelerate launch --config_file …`` command of a text, continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = re.findall(r"accelerate launch (--config_file .*)$", joined, re.MULTILINE)
    return [shlex.split(one) for one in found]


@by_name(TOPOLOGIES + RECIPES)
def test_the_header_is_a_manual(path: Path) -> None:
    text = header(path)
    assert len(text.splitlines()[0]) > 10
    for part in ("Hardware", "Command", "Override"):
        assert re.search(rf"^{part}\b", text, re.MULTILINE | re.IGNORECASE), f"{path.name} has no {part}"
    assert any(path.relative_to(REPOSITORY).as_posix() in words for words in commands(text))


PAGE = REPOSITORY / "docs" / "launch.md"
MANUALS = [
    *((path, header(path)) for path in [*TOPOLOGIES, *RECIPES]),
    (PAGE, PAGE.read_text(encoding="utf-8")),
]
PRINTED_COMMANDS = [
    pytest.param(words, id=f"{path.stem}-{number}")
    for path, text in MANUALS
    for number, words in enumerate(commands(text))
]


@pytest.mark.parametrize("words", PRINTED_COMMANDS)
def test_every_printed_command_would_start(words: list[str]) -> None:
    """In headers and on the page: accelerate takes its part, the files exist, and the recipe takes the overrides."""
    from training_ready.recipe.load import load_recipe

    args, _ = launched(words)
    assert (REPOSITORY / args.training_script).is_file()
    recipe, *overrides = args.training_script_args
    load_recipe(recipe, overrides, environment={})
    if args.deepspeed_config_file:
        assert (REPOSITORY / args.deepspeed_config_file).is_file()
