"""Do branches and routers from domain means beat copies and random routers, at equal tokens?

A small dense model learns CounselChat's other topics, then becomes four experts of its four largest topics in five
ways, each with the same number of tokens, and is judged on answers to questions that it never saw.

    python benchmarks/upcycle_toy.py path/to/20200325_counsel_chat.csv --json benchmarks/results/upcycle_toy.json

A quarter of an hour on one CPU core. A toy: it can show a direction, not a size.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import platform
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedTokenizerFast

from training_ready.moe.balance import GlobalBatchBalance
from training_ready.moe.domains import DomainLoadMonitor
from training_ready.moe.upcycle import UpcyclePlan, upcycle
from training_ready.moe.upcycle_branches import Branch

LENGTH, ROWS_PER_DOMAIN = 64, 4
BASE_STEPS, BRANCH_STEPS, JOINT_STEPS = 800, 75, 300
LEARNING_RATE, BALANCE = 2e-3, 0.01
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


def read_answers(path: Path) -> tuple[list[str], dict[str, list[str]], dict[str, list[str]]]:
    """(Answers of other topics, training answers by domain, held-out answers by domain).

    Held out is every fifth *question* with all its answers. Only the answer's text is read.
    """
    csv.field_size_limit(10**7)
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["topic"] and (row["answerText"] or "").strip()]
    domains = [topic for topic, _ in Counter(row["topic"] for row in rows).most_common(4)]
    held_out = {
        question
        for domain in domains
        for question in sorted({row["questionID"] for row in rows if row["topic"] == domain})[::5]
    }
    others = [
        row["answerText"] for row in rows if row["topic"] not in domains and row["questionID"] not in held_out
    ]
    train: dict[str, list[str]] = {domain: [] for domain in domains}
    test: dict[str, list[str]] = {domain: [] for domain in domains}
    for row in rows:
        if row["topic"] in domains:
            (test if row["questionID"] in held_out else train)[row["topic"]].append(row["answerText"])
    return others, train, test


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


def train(model: Any, data: Iterator[Tensor]) -> None:
    """The language loss, and per layer the balance loss where there are routers."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.01)
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
    seed: int, folder: Path, data: dict[str, Any], tokenizer: PreTrainedTokenizerFast, *, trained: str
) -> dict[str, Any]:
    torch.manual_seed(seed)
    pools: dict[str, Tensor] = data["train"]
    everything = ROWS_PER_DOMAIN * len(pools)
    dense: Any = AutoModelForCausalLM.from_config(MistralConfig(**SHAPE))
    train(dense, batches([data["others"]], BASE_STEPS, everything, seed))
    base = folder / "base"
    dense.save_pretrained(base)
    tokenizer.save_pretrained(base)
    for index, domain in enumerate(pools):
        branch = only_feed_forward(AutoModelForCausalLM.from_pretrained(base))
        train(branch, batches([pools[domain]], BRANCH_STEPS, everything, 100 * seed + index))
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
        train(model, batches(list(pools.values()), steps, ROWS_PER_DOMAIN, 1000 + seed))
        found[arm] = {"start": start, "end": evaluate(model, data["test"])}
        print(f"seed {seed}  {arm:<32}{_cells(found[arm])}", flush=True)
    return found


def _cells(result: dict[str, Any]) -> str:
    parts = []
    for key in ("loss", "mutual_information", "smallest_share"):
        pair = [f"{result[when][key]:.3f}" for when in ("start", "end") if key in result.get(when, {})]
        parts.append(" -> ".join(pair) or "-")
    return " | ".join(parts)


def mean_over_seeds(runs: list[dict[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for arm in runs[0]:
        table[arm] = {}
        for when, values in runs[0][arm].items():
            keys = [key for key, value in values.items() if isinstance(value, float)]
            table[arm][when] = {key: sum(run[arm][when][key] for run in runs) / len(runs) for key in keys}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("answers", type=Path, help="CounselChat's CSV file")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--train",
        choices=("experts", "all"),
        default="experts",
        help="what the joint stage trains: experts and routers as shared-base training does, or all weights",
    )
    parser.add_argument("--json", type=Path, help="write all numbers here")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    others, train_texts, test_texts = read_answers(options.answers)
    tokenizer = train_tokenizer(others + [text for texts in train_texts.values() for text in texts])
    with tempfile.TemporaryDirectory() as place:
        texts = Path(place) / "labelled.jsonl"
        rows = [{"domain": domain, "text": text} for domain, each in train_texts.items() for text in each]
        texts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data = {
            "others": rows_of(others, tokenizer),
            "train": {domain: rows_of(each, tokenizer) for domain, each in train_texts.items()},
            "test": {domain: rows_of(each, tokenizer) for domain, each in test_texts.items()},
            "texts": texts,
        }
        for split in ("train", "test"):
            print(split, {domain: each.numel() for domain, each in data[split].items()}, "tokens", flush=True)
        runs = []
        for seed in range(options.seeds):
            folder = Path(place) / str(seed)
            folder.mkdir()
            runs.append(run_seed(seed, folder, data, tokenizer, trained=options.train))
    table = mean_over_seeds(runs)
    print("| arm | eval loss | MI(domain; expert), nats | smallest share |\n|---|---|---|---|")
    for arm, result in table.items():
        print(f"| {arm} | {_cells(result)} |")
    if options.json:
        facts = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s), CPU",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "trained": options.train,
            "settings": {
                "shape": SHAPE,
                "steps": [BASE_STEPS, BRANCH_STEPS, JOINT_STEPS],
                "rows": ROWS_PER_DOMAIN,
            },
            "mean": table,
            "runs": runs,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
