"""``training-ready data peek | stats | simulate``: look at the stream of a recipe before it is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from training_ready.recipe.recipe import Recipe
    from training_ready.training.data import RunData

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Values on top: key=value or --key value."),
]
TAKES_OVERRIDES = {"ignore_unknown_options": True}


def data_peek(
    recipe: RecipePath,
    overrides: Overrides = None,
    packs: Annotated[int, typer.Option(min=1, help="Packs to show.")] = 2,
    position: Annotated[int, typer.Option(min=0, help="Packs before the first one shown.")] = 0,
) -> None:
    """Print the next packs of the stream as text, what is learned in green (between » and « without colours).

    Example: training-ready data peek recipes/quickstart.yaml --packs 1
    """
    from itertools import islice

    from rich.console import Console
    from rich.text import Text

    from training_ready.stream.dataset import pack_stream

    console = Console()
    data, tokenizer = _open(_loaded(recipe, overrides), 1, Console(stderr=True))
    stream = pack_stream(data.packs, position=position)
    for number, pack in enumerate(islice(stream, packs), start=position):
        lengths, at = pack["seq_lengths"], 0
        console.rule(
            f"pack {number}: {len(lengths)} conversations, {sum(lengths)} of {data.max_length} tokens"
        )
        for length in lengths:
            ids, labels = (pack[name][at : at + length].tolist() for name in ("input_ids", "labels"))
            text = Text(f"── {length} tokens, {sum(label >= 0 for label in labels)} learned\n", style="dim")
            for learned, run in _runs(ids, labels):
                decoded = tokenizer.decode(run)
                shown = decoded if console.color_system or not learned else f"»{decoded}«"
                text.append(shown, style="bold green" if learned else "not dim")
            console.print(text, soft_wrap=True)
            at += length


def data_stats(
    recipe: RecipePath,
    overrides: Overrides = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the distributions into this PNG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print for a machine.")] = False,
) -> None:
    """Count rows, tokens and lengths of what a recipe trains on, by part, source and stage.

    Example: training-ready data stats recipes/quickstart.yaml --plot lengths.png
    """
    import json

    from rich.console import Console
    from rich.table import Table

    from training_ready.stream.statistics import draw_statistics, statistics

    data, _ = _open(_loaded(recipe, overrides), 1, Console(stderr=True))
    data.packs.plan.wait_for_all()
    found = statistics(data.packs.plan, data.max_length, data.counts)
    if plot:
        draw_statistics(data.packs.plan, data.max_length, plot)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    table = Table("part", "source", "stage", *(f"[right]{c}[/]" for c in ("rows", "tokens", "learned")))
    for line in found["cells"]:
        counts = [f"{line[name]:,}" for name in ("rows", "tokens", "learned_tokens")]
        table.add_row(line["part"], line["source"], line["stage"], *counts)
    console = Console()
    console.print(table)
    for name, part in found["parts"].items():
        lengths = ", ".join(f"{key} {value:,}" for key, value in part["lengths"].items())
        console.print(
            f"{name}: {part['packs_per_epoch']:,} packs an epoch, {part['fill']:.1%} full; lengths: {lengths}",
            highlight=False,
        )
    console.print(", ".join(f"{key} {value:,}" for key, value in found["policy"].items()), highlight=False)


def data_simulate(
    recipe: RecipePath,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes of the run.")] = 8,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps to deal out; default: about 100,000 packs.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print for a machine.")] = False,
) -> None:
    """Deal out the stream to ranks and count what each would read; nothing is read but the index of the tokens.

    Example: training-ready data simulate recipes/sft.yaml --ranks 512
    """
    import json
    from dataclasses import asdict

    from rich.console import Console

    from training_ready.stream.simulate import GETS_PER_SECOND, simulate

    loaded = _loaded(recipe, overrides)
    data, _ = _open(loaded, ranks, Console(stderr=True))
    global_batch = _global_batch(loaded, ranks)
    wanted = steps or max(1, 100_000 // global_batch)
    found = simulate(data.packs.plan, ranks=ranks, global_batch=global_batch, steps=wanted)
    if as_json:
        print(json.dumps(asdict(found) | {"requests_per_step": found.requests_per_step}, indent=2))
        return
    of = "" if found.steps_in_all is None else f" of {found.steps_in_all:,}"
    least_most = "{0[0]:,} to {0[1]:,}"
    for line in (
        f"{found.ranks} ranks, {found.lanes} lanes, {found.global_batch} packs a step; {found.steps:,}{of} steps, "
        f"the same on every rank; {found.packs:,} packs, each once",
        f"per rank: rows {least_most.format(found.rows)}, tokens {least_most.format(found.tokens)}, "
        f"bytes fetched {least_most.format(found.fetched_bytes)}",
        f"all ranks: {found.blocks:,} blocks fetched, {found.requests_per_step:.2f} requests a step; every stored "
        f"byte is fetched {found.reads_per_byte:.2f} times",
        f"steps shorter than {found.fastest_step_seconds:.4f} s would pass the bucket's {GETS_PER_SECOND} GET/s",
    ):
        Console().print(line, highlight=False, soft_wrap=True)
    if found.lanes < ranks:
        Console().print(
            f"{ranks / found.lanes:g} ranks share each lane and its blocks: stream.lanes={ranks} reads less",
            highlight=False,
        )


def _loaded(recipe: Path, overrides: list[str] | None) -> Recipe:
    from training_ready.recipe.load import load_recipe

    return load_recipe(recipe, overrides or ())


def _global_batch(recipe: Recipe, ranks: int) -> int:
    per_rank = recipe.effective("per_device_train_batch_size") * recipe.effective(
        "gradient_accumulation_steps"
    )
    return int(per_rank * ranks)


def _open(recipe: Recipe, ranks: int, console: Console) -> tuple[RunData, Any]:
    """The recipe's packs as a run would see them, and its tokenizer."""
    # The one place where this room looks into the next: a recipe's data are put together by the trainer.
    from training_ready.stream.render import ChatRenderer
    from training_ready.training.data import corpus_texts, open_corpus, prepare_data
    from training_ready.training.tokenizer import load_tokenizer, train_tokenizer

    manifest, store = open_corpus(recipe.data.corpus)
    trained, wanted = recipe.output_dir / "tokenizer", recipe.model.tokenizer
    if wanted is None:
        tokenizer: Any = load_tokenizer(
            str(recipe.effective("model_name_or_path")),
            revision=recipe.effective("model_revision"),
            chat_template_path=recipe.effective("chat_template_path"),
            pad_token=recipe.effective("pad_token"),
        )
    elif trained.exists():
        tokenizer = load_tokenizer(str(trained))
    else:
        texts = corpus_texts(store, manifest, recipe.data.train_split)
        tokenizer = train_tokenizer(texts, vocab_size=wanted.vocab_size, chat_template=wanted.chat_template)
    renderer = ChatRenderer(tokenizer, recipe.data.target_role)
    batch = _global_batch(recipe, ranks)
    return prepare_data(recipe, manifest, store, renderer, console, global_batch=batch), tokenizer


def _runs(ids: list[int], labels: list[int]) -> list[tuple[bool, list[int]]]:
    """Tokens in runs of (learned?, ids)."""
    from itertools import groupby

    marked = groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] >= 0)
    return [(learned, [token for token, _ in run]) for learned, run in marked]
