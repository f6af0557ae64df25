"""Do the pairs of an exported adapter add what was trained? Each product B·A is compared with PEFT's definition."""

from __future__ import annotations

from pathlib import Path

from training_ready.release.export import ExportError
from training_ready.release.targets.adapter import CONFIG, WEIGHTS, base_family, fused_parts
from training_ready.release.targets.proof import Finding
from training_ready.release.targets.tokenizer_files import TOKENIZER, read_json
from training_ready.release.targets.weights import PER_EXPERT


def verify(folder: Path, checkpoint: Path) -> list[Finding]:
    """Dense tensors bit for bit; for experts the change of every weight matrix, in float32."""
    from safetensors.torch import load_file

    config = read_json(checkpoint / CONFIG)
    trained, served = load_file(checkpoint / WEIGHTS), load_file(folder / WEIGHTS)
    worst, pairs = 0.0, 0
    for key in [key for key in trained if fused_parts(key, config) and ".lora_A." in key]:
        block, projection = fused_parts(key, config) or ("", "")
        a = trained.pop(key).float()
        b = trained.pop(key.replace(".lora_A.", ".lora_B.")).float()
        rank = int(config["r"])
        # As PEFT computes it: A is (E, r, in), B is (out, r, E).
        change = (
            b.view(b.shape[0], rank, -1).permute(2, 0, 1).bmm(a.view(-1, rank, a.shape[1]))
        )  # (E, out, in)
        experts, gate, up, down = PER_EXPERT[base_family(config)]
        names = (down,) if projection == "down_proj" else (gate, up)
        for expert, whole in enumerate(change):
            for name, part in zip(names, whole.chunk(len(names)), strict=True):
                stem = f"{block}.{experts}.experts.{expert}.{name}.lora_"
                try:
                    product = served.pop(f"{stem}B.weight").float() @ served.pop(f"{stem}A.weight").float()
                except KeyError as error:
                    raise ExportError(f"{folder / WEIGHTS} lacks {error}") from error
                worst, pairs = max(worst, float((product - part).abs().max())), pairs + 1
    same = trained.keys() == served.keys() and all(trained[key].equal(served[key]) for key in trained)
    words = [name for name in TOKENIZER if (checkpoint / name).is_file()]
    kept = all((folder / name).read_bytes() == (checkpoint / name).read_bytes() for name in words)
    return [
        Finding(
            check="tokenizer", result=f"{len(words)} files, {'equal' if kept else 'different'}", passed=kept
        ),
        Finding(
            check="dense pairs",
            result=f"{len(trained)} tensors, {'equal' if same else 'different'}",
            passed=same,
        ),
        Finding(check="expert pairs", result=f"{pairs} products, max |Δ| {worst:.1e}", passed=worst <= 1e-6),
    ]
