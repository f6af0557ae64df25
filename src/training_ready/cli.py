"""The front door: ``training-ready recipe · check · data · moe · release · serve · launch …``.

Each command lives in its room's ``commands.py`` and imports what is heavy only when it runs.
"""

from __future__ import annotations

import sys

import typer

from training_ready import TrainingReadyError, __version__
from training_ready.check import commands as check
from training_ready.corpus import commands as corpus
from training_ready.moe import commands as moe
from training_ready.platforms import commands as platforms
from training_ready.recipe import commands as recipe
from training_ready.release import commands as release
from training_ready.release import hub_commands as hub
from training_ready.release.targets import commands as targets
from training_ready.serving import commands as serving
from training_ready.storage import commands as storage
from training_ready.training import commands as training

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="From a bucket of conversations to a served model. To train: accelerate launch scripts/run_sft.py RECIPE",
)


def _group(name: str, question: str) -> typer.Typer:
    group = typer.Typer(no_args_is_help=True, help=question)
    app.add_typer(group, name=name)
    return group


_recipe = _group("recipe", "What is this run? Show, list, copy, migrate recipes.")
_recipe.command("show", context_settings=recipe.TAKES_OVERRIDES)(recipe.recipe_show)
_recipe.command("ls")(recipe.recipe_ls)
_recipe.command("cp")(recipe.recipe_cp)
_recipe.command("schema")(recipe.recipe_schema)
_recipe.command("migrate")(recipe.recipe_migrate)

_store = _group("store", "Where do the bytes live? A real S3 store on this machine.")
_store.command("serve")(storage.store_serve)

_data = _group("data", "What do we train on? Upload sources, build corpora, prove access.")
_data.command("verify")(storage.data_verify)
_data.command("upload")(storage.data_upload)
_data.command("build")(corpus.data_build)
_data.command("peek", context_settings=training.TAKES_OVERRIDES)(training.data_peek)
_data.command("stats", context_settings=training.TAKES_OVERRIDES)(training.data_stats)
_data.command("simulate", context_settings=training.TAKES_OVERRIDES)(training.data_simulate)

_moe = _group("moe", "How does a dense model become domain experts? Upcycle, export.")
_moe.command("upcycle")(moe.moe_upcycle)
_moe.command("export")(moe.moe_export)

_release = _group("release", "Is it fit to leave? Export, card, verified push.")
_release.command("build")(release.release_build)
_release.command("export")(targets.release_export)
_release.command("verify")(targets.release_verify)
_release.command("publish")(release.release_publish)

_hub = _group("hub", "A Hugging Face Hub on this machine.")
_hub.command("serve")(hub.hub_serve)
_hub.command("check")(hub.hub_check)
_token = typer.Typer(no_args_is_help=True, help="Who may read and write this hub?")
_hub.add_typer(_token, name="token")
_token.command("add")(hub.hub_token_add)
_token.command("revoke")(hub.hub_token_revoke)
_token.command("ls")(hub.hub_token_ls)

_launch = _group("launch", "Which machine runs it? Job specs of platforms.")
_launch.command("ovh")(platforms.launch_ovh)

app.command("check", context_settings=recipe.TAKES_OVERRIDES)(check.check)
app.command("serve")(serving.serve)
app.command("ask")(serving.ask)


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version and leave.")) -> None:
    if version:
        typer.echo(f"training-ready {__version__}")
        raise typer.Exit


def main() -> None:
    """Runs a command; a failure that a person can act on is one message and exit status 1."""
    try:
        app()
    except TrainingReadyError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
