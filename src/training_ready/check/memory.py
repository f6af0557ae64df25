"""Does the peak of a step fit the GPU? Traced from the real model, loss and optimizer code, without weights or GPU."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from training_ready import TrainingReadyError
from training_ready.check.context import CheckContext
from training_ready.check.finding import Finding, failed, not_run, passed
from training_ready.recipe.recipe import Recipe

if TYPE_CHECKING:
    from training_ready.check.memory_plan import MemoryPlan
    from training_ready.check.memory_trace import PeakMemory

GIB = 2**30
MARGIN = 0.06
"""Share of a GPU that a run cannot use: CUDA's context and libraries, and what the allocator cannot join. An
assumption, until it is measured on a GPU."""
CARD_GIB = {"V100S": 31.7, "A10": 22.5, "L4": 22.5, "L40S": 45.0, "A100": 80.0, "H100": 79.6}
"""Memory that the driver shows for the cards of OVHcloud's flavours, ECC on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A GPU, by the key that names it; ``usable`` GiB after the margin."""

    name: str
    key: str
    gib: float

    @property
    def usable(self) -> float:
        return self.gib * (1 - MARGIN)


def probe_memory(context: CheckContext) -> list[Finding]:
    """Traces one step and compares its peak with the target GPU."""
    from training_ready.check.memory_plan import peak_of, plan_of

    try:
        plan = plan_of(context)
        peak = peak_of(plan)
    except (
        TrainingReadyError
    ) as error:  # faults of model, adapters and routers are reported by their own probes
        return [not_run(str(error))]
    target = target_of(context.recipe)
    measured: dict[str, Any] = {
        "peak_gib": round(peak.peak.total / GIB, 2),
        "moment": peak.moment,
        "split_gib": {kind: round(bytes_ / GIB, 2) for kind, bytes_ in asdict(peak.peak).items()},
        "traced_layers": list(peak.traced_layers),
        "target_gib": target.gib if target else None,
        "margin": MARGIN,
    }
    said = describe(peak)
    if context.topology.use_cpu:
        return [passed(f"{said} in host memory, besides Python and its libraries", **measured)]
    if target is None:
        return [passed(f"{said}; compared with nothing: set launch.gpu_memory_gib", **measured)]
    room = f"{target.usable:.1f} GiB usable of {target.name} ({target.gib:g} GiB less {MARGIN:.0%})"
    if peak.peak.total <= target.usable * GIB:
        return [passed(f"{said}; {room}", **measured)]
    return [
        failed(
            f"{said}; that is {peak.peak.total / GIB - target.usable:.1f} GiB more than the {room}",
            key=target.key,
            fix=_advice(plan, peak, target),
            **measured,
        )
    ]


def target_of(recipe: Recipe) -> Target | None:
    """The GPU of the recipe: ``launch.gpu_memory_gib``, or the card of the OVHcloud flavour."""
    from training_ready.platforms.ovh import FLAVORS

    given = recipe.launch.gpu_memory_gib
    if given is not None:
        return Target(name="the GPU", key="launch.gpu_memory_gib", gib=given)
    flavor = FLAVORS.get(recipe.launch.ovh.flavor) if recipe.launch.ovh else None
    if flavor is None:
        return None
    return Target(name=f"a {flavor.card}", key="launch.ovh.flavor", gib=CARD_GIB[flavor.card])


def describe(peak: PeakMemory) -> str:
    """The peak in a sentence, with its parts and how it was found."""
    parts = ", ".join(f"{kind} {b / GIB:.1f}" for kind, b in asdict(peak.peak).items() if b >= 0.05 * GIB)
    layers = peak.traced_layers
    how = f"extrapolated from {', '.join(map(str, layers))} layers" if layers else "all layers traced"
    return f"peak {peak.peak.total / GIB:.1f} GiB per process in the {peak.moment} ({parts}; {how})"


def _advice(plan: MemoryPlan, peak: PeakMemory, target: Target) -> str:
    from training_ready.check.memory_fit import best_changes

    changes = best_changes(plan, peak.peak.total)
    told = [
        f"{change.keys}: {change.peak / GIB:.1f} GiB ({'fits' if change.peak <= target.usable * GIB else 'not enough'})"
        for change in changes
    ]
    return "one of: " + "; ".join(told) if told else "take a larger GPU: no single change lowers the peak"
