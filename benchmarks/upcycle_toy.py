"""Do branches and routers from domain means beat copies and random routers, at equal tokens?

A small dense model becomes four experts of four domains in five ways, each with the same number of tokens, and is
judged on texts that it never saw. Every stage warms up and decays to nothing, so that the losses compared are those of
finished models; branches spend half of the tokens apart.

    python benchmarks/upcycle_toy.py path/to/20200325_counsel_chat.csv --corpus kinds --json benchmarks/results/toy.json

A quarter of an hour on one CPU core. A toy: it can show a direction, not a size.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedTokenizerFast
from upcycle_corpora import CORPORA

from training_ready.moe.balance import GlobalBatchBalance
from training_ready.moe.domains import DomainLoadMonitor
from training_ready.moe.upcycle import UpcyclePlan, upcycle
from training_ready.moe.upcycle_branches import Branch

LENGTH, ROWS_PER_DOMAIN = 64, 4
BASE_STEPS, BRANCH_STEPS, JOINT_STEPS = 1000, 100, 400
LEARNING_RATE, WARM_UP, BALANCE = 2e-3, 20, 0.01
SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": LENGTH,
    "sliding_window": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARMS = {
    "dense, continued": None,
    "copies + random router": (False, False),
    "copies + domain-mean router": (False, True),
    "branches + random router": (True, False),
    "branches + domain-mean router": (True, True),
}


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=SHAPE["vocab_size"], special_tokens=["<pad>", "<s>", "</s>"])
    named = {"pad_token": "<pad>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **named)


def rows_of(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """All texts end to end, cut into rows (N, LENGTH)."""
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def batches(pools: list[Tensor], steps: int, rows: int, seed: int) -> Iterator[Tensor]:
    """``rows`` rows of each pool per step, drawn at random without replacement until a pool is used up."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(pool), generator=generator) for pool in pools]
    for _ in range(steps):
        picked = []
        for index, pool in enumerate(pools):
            if len(orders[index]) < rows:
                orders[index] = torch.randperm(len(pool), generator=generator)
            picked.append(pool[orders[index][:rows]])
            orders[index] = orders[index][rows:]
        yield torch.cat(picked)


def train(model: Any, data: Iterator[Tensor], *, steps: int) -> None:
    """The language loss, and per layer the balance loss where there are routers; warm-up, then a cosine to zero."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / WARM_UP, (1 + math.cos(math.pi * step / steps)) / 2),
    )
    routed = model.config.model_type == "mixtral"
    balance = GlobalBatchBalance(top_k=2)
    if routed:
        model.router_aux_loss_coef = 0.0  # ours is per layer and over the whole batch
    model.train()
    for ids in data:
        extra = {"output_router_logits": True} if routed else {}
        out = model(input_ids=ids, labels=ids, use_cache=False, **extra)
        loss = out.loss
        if routed:
            loss = loss + BALANCE * balance.loss(out.router_logits).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimiser.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def evaluate(model: Any, test: dict[str, Tensor]) -> dict[str, Any]:
    """Loss on the same number of rows of each domain, MI(domain; expert) and the smallest share of an expert."""
    rows = min(len(each) for each in test.values())
    losses = {}
    monitor = DomainLoadMonitor(model, list(test)) if model.config.model_type == "mixtral" else None
    for index, (domain, pool) in enumerate(test.items()):
        ids = pool[:rows]
        if monitor is None:
            losses[domain] = float(model(input_ids=ids, labels=ids).loss)
        else:
            with monitor.tokens(torch.full(ids.shape, index)):
                losses[domain] = float(model(input_ids=ids, labels=ids).loss)
    found: dict[str, Any] = {"loss": sum(losses.values()) / len(losses), "losses": losses}
    if monitor is not None:
        load = monitor.counts().sum(dim=1).double()
        by_layer = monitor.mutual_information().values()
        found["mutual_information"] = sum(by_layer) / len(by_layer)
        found["smallest_share"] = float((load / load.sum(dim=1, keepdim=True)).min())
        monitor.close()
    return found


def only_feed_forward(model: Any) -> Any:
    """Experts and routers train, or the dense feed-forward; all else is frozen, as in shared-base training."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    return model


def run_seed(
    seed: int,
    folder: Path,
    data: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    *,
    trained: str,
    branch_steps: int,
) -> dict[str, Any]:
    torch.manual_seed(seed)
    pools: dict[str, Tensor] = data["train"]
    everything = ROWS_PER_DOMAIN * len(pools)
    dense: Any = AutoModelForCausalLM.from_config(MistralConfig(**SHAPE))
    train(dense, batches([data["base"]], BASE_STEPS, everything, seed), steps=BASE_STEPS)
    base = folder / "base"
    dense.save_pretrained(base)
    tokenizer.save_pretrained(base)
    for index, domain in enumerate(pools):
        branch = only_feed_forward(AutoModelForCausalLM.from_pretrained(base))
        shown = batches([pools[domain]], branch_steps, everything, 100 * seed + index)
        train(branch, shown, steps=branch_steps)
        branch.save_pretrained(folder / domain)
    found: dict[str, Any] = {"dense, at the start": {"start": evaluate(dense, data["test"])}}
    for arm, kinds in ARMS.items():
        branched, means = kinds or (False, False)
        if kinds is None:
            model = AutoModelForCausalLM.from_pretrained(base)
        else:
            branches = [
                Branch(domain=domain, source=folder / domain if branched else None) for domain in pools
            ]
            plan = UpcyclePlan(
                base=base, branches=branches, texts=data["texts"] if means else None, seed=seed
            )
            work = folder / arm.replace(" ", "_")
            upcycle(plan, work)
            model = AutoModelForCausalLM.from_pretrained(work / "5-export")
        start = evaluate(model, data["test"])
        if trained == "experts":
            only_feed_forward(model)
        steps = JOINT_STEPS if branched else JOINT_STEPS + BRANCH_STEPS * len(pools)
        train(model, batches(list(pools.values()), steps, ROWS_PER_DOMAIN, 1000 + seed), steps=steps)
        found[arm] = {"start": start, "end": evaluate(model, data["test"])}
        print(f"seed {seed}  {arm:<32}{_cells([found[arm]])}", flush=True)
    return found


KEYS = ("loss", "mutual_information", "smallest_share")


def _cells(results: list[dict[str, Any]]) -> str:
    """Start -> end of each key: the mean over seeds and, of several, the standard deviation."""
    cells = []
    for key in KEYS:
        pair = []
        for when in ("start", "end"):
            values = [result[when][key] for result in results if key in result.get(when, {})]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            pair += [f"{statistics.mean(values):.3f}{spread}"] if values else []
        cells.append(" -> ".join(pair) or "-")
    return " | ".join(cells)


def gained(runs: list[dict[str, Any]], when: str = "end") -> list[float]:
    """By seed: eval loss of copies with a random router less that of branches with domain means."""
    copies, branches = "copies + random router", "branches + domain-mean router"
    return [run[copies][when]["loss"] - run[branches][when]["loss"] for run in runs]


def prepare(options: argparse.Namespace, place: Path) -> tuple[dict[str, Any], PreTrainedTokenizerFast]:
    found = CORPORA[options.corpus](options.answers)
    tokenizer = train_tokenizer(found.base + [text for texts in found.train.values() for text in texts])
    texts = place / "labelled.jsonl"
    rows = [{"domain": domain, "text": text} for domain, each in found.train.items() for text in each]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {
        "base": rows_of(found.base, tokenizer),
        "train": {domain: rows_of(each, tokenizer) for domain, each in found.train.items()},
        "test": {domain: rows_of(each, tokenizer) for domain, each in found.test.items()},
        "texts": texts,
    }
    print("base", data["base"].numel(), "tokens", flush=True)
    for split in ("train", "test"):
        print(split, {domain: each.numel() for domain, each in data[split].items()}, "tokens", flush=True)
    return data, tokenizer


def facts(options: argparse.Namespace, runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s), CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "corpus": options.corpus,
        "trained": options.train,
        "settings": {
            "shape": SHAPE,
            "steps": [BASE_STEPS, options.branch_steps, JOINT_STEPS],
            "rows": ROWS_PER_DOMAIN,
            "learning_rate": LEARNING_RATE,
        },
        "gained": gained(runs),
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("answers", type=Path, help="CounselChat's CSV file")
    parser.add_argument("--corpus", choices=CORPORA, default="topics", help="see upcycle_corpora.py")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--train",
        choices=("experts", "all"),
        default="experts",
        help="what the joint stage trains: experts and routers as shared-base training does, or all weights",
    )
    parser.add_argument(
        "--branch-steps",
        type=int,
        default=BRANCH_STEPS,
        help=f"{BRANCH_STEPS}: equal tokens for all arms; twice as many: equal work in the feed-forwards, because a "
        "branch computes one of them per token and a mixture two",
    )
    parser.add_argument("--json", type=Path, help="write all numbers here, again after every seed")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as place:
        data, tokenizer = prepare(options, Path(place))
        runs: list[dict[str, Any]] = []
        for seed in range(options.seeds):
            folder = Path(place) / str(seed)
            folder.mkdir()
            runs.append(
                run_seed(
                    seed, folder, data, tokenizer, trained=options.train, branch_steps=options.branch_steps
                )
            )
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(facts(options, runs), indent=1) + "\n", encoding="utf-8")
    print("| arm | eval loss | MI(domain; expert), nats | smallest share |\n|---|---|---|---|")
    for arm in runs[0]:
        print(f"| {arm} | {_cells([run[arm] for run in runs])} |")
    print("branches + domain means gained over copies + random:", [round(gain, 4) for gain in gained(runs)])


if __name__ == "__main__":
    main()
