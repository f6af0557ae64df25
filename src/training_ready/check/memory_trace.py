"""What does one step hold, moment by moment? Traced on fake tensors: real code, no weights, no GPU.

A step has a few moments that can be the highest: the end of the forward, the loss, the backward of the last and of the
first layer, the backward of the embedding, the optimizer. Each is recorded by itself, because each grows along a line
of its own with the number of layers. A deep model of equal layers is therefore traced with 2, 3 and 4 of them; where
the three do not lie on a line, or the layers differ, the whole model is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import PretrainedConfig

from training_ready.check.memory_kernels import fake_grouped_products, gpu_kernels
from training_ready.check.memory_step import (
    OPTIMIZERS,
    StepSpec,
    TraceError,
    build_model,
    router_losses,
    run_step,
    trainable,
    warm_up,
)

FORWARD, BETWEEN = "forward", "backward in between"
FEW = (2, 3, 4)
"""Layers of the traced cuts of a deep model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Bytes on one device at one moment, by what they are."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    loss: int = 0
    """Logits, the gradients of the head while they are summed, and the router's auxiliary loss."""
    gathers: int = 0
    """Weights of other devices, and buffers of collectives."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def plus(self, **more: int) -> Split:
        return replace(self, **{name: getattr(self, name) + bytes_ for name, bytes_ in more.items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class PeakMemory:
    """The moments of a step; ``traced_layers`` is empty where the whole model was traced."""

    moments: Mapping[str, Split]
    traced_layers: tuple[int, ...] = ()

    @property
    def moment(self) -> str:
        """The name of the highest moment."""
        return max(self.moments, key=lambda name: self.moments[name].total)

    @property
    def peak(self) -> Split:
        return self.moments[self.moment]


def trace_step(spec: StepSpec) -> PeakMemory:
    """The memory of one step in steady state, in bytes.

    Raises:
        TraceError: nothing is trainable, or the model does not run on fake tensors.
    """
    layers = _layer_count(spec.config)
    if layers > FEW[-1]:
        cuts = [_traced(replace(spec, config=cut_layers(spec.config, few))) for few in FEW]
        if _on_a_line(cuts) and _layers_alike(spec.config):
            return PeakMemory(moments=_extrapolated(cuts, layers), traced_layers=FEW)
    return PeakMemory(moments=_traced(spec))


# --------------------------------------------------------------------------- one trace
def _traced(spec: StepSpec) -> dict[str, Split]:
    with FakeTensorMode():
        try:
            return _measured(spec)
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise TraceError(
                f"{spec.config.model_type} with attention {spec.attention} cannot be traced: "
                f"{type(error).__name__}: {reason}"
            ) from error


def _measured(spec: StepSpec) -> dict[str, Split]:
    with gpu_kernels() if spec.device == "gpu" else fake_grouped_products():
        model = build_model(spec)
        weights = trainable(model)
        if not weights:
            raise TraceError("nothing is trainable: the adapter's targets match no module")
        optimizer = (
            None if spec.optimizer is None else OPTIMIZERS[spec.optimizer](weights, spec.device == "gpu")
        )
        warm_up(model, optimizer, spec)
        tracker = MomentTracker(model, optimizer, copies_learned=spec.device == "gpu")
        with tracker:
            run_step(model, optimizer, spec, router_losses(model, spec))
    return tracker.moments()


class MomentTracker(MemTracker):  # type: ignore[no-untyped-call]
    """torch's tracker, with one peak per moment instead of one per module, and the loss as a kind of its own.

    Peaks per module cost a pass over all modules at every operator: minutes for a deep model. And torch 2.13's own
    hooks raise on frozen weights (``cannot register a hook on a tensor that doesn't require gradient``) and at a second
    forward.

    Args:
        model: its backbone and layers tell which moment it is.
        copies_learned: the loss picks out the rows that have a label, a copy, as it does on a GPU.
    """

    def __init__(
        self, model: Any, optimizer: torch.optim.Optimizer | None, *, copies_learned: bool = False
    ) -> None:
        super().__init__()
        self._model, self._copies_learned = model, copies_learned
        self._moment, self._in_loss = FORWARD, False
        self._peaks: dict[str, dict[Any, int]] = {}
        self._hooks: list[Any] = []
        self.track_external(model, *([optimizer] if optimizer else []))

    def moments(self) -> dict[str, Split]:
        return {name: _split(snapshot) for name, snapshot in self._peaks.items()}

    def __enter__(self) -> MomentTracker:
        base = self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model
        backbone = base.base_model
        layers = decoder_layers(backbone)
        self._last = len(layers) - 1
        self._hooks = [
            backbone.register_forward_pre_hook(self._forward_begins),
            backbone.register_forward_hook(self._loss_begins),
            *(layer.register_forward_pre_hook(self._layer_begins(i)) for i, layer in enumerate(layers)),
            register_optimizer_step_pre_hook(self._optimizer_begins),
        ]
        for weight in trainable(self._model):
            hooks: Any = weight
            self._hooks.append(hooks.register_hook(self._is_gradient))
            self._hooks.append(hooks.register_post_accumulate_grad_hook(lambda w: self._is_gradient(w.grad)))
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        for hook in self._hooks:
            hook.remove()

    # ---------------------------------------------------------------- what torch's tracker asks
    def _track(self, reftype: Any, t: Tensor) -> None:
        super()._track(_MemRefType.OTH if self._in_loss else reftype, t)

    def _update_peak_stats(self, peak_state: Any) -> None:
        for snapshot in self._curr_mem_snap.values():
            highest = self._peaks.get(self._moment)
            if highest is None or snapshot["Total"] > highest["Total"]:
                self._peaks[self._moment] = dict(snapshot)

    def _pre_fw_hook(self, *_: Any) -> None:
        """Nothing per module, here and in the next three."""

    _post_fw_hook = _pre_bw_hook = _post_bw_hook = _pre_fw_hook  # type: ignore[assignment]

    # ---------------------------------------------------------------- which moment it is
    def _is_gradient(self, gradient: Tensor) -> None:
        self._update_and_maybe_create_winfos(gradient, _MemRefType.GRAD)

    def _forward_begins(self, *_: Any) -> None:
        self._moment = FORWARD

    def _loss_begins(self, backbone: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output.last_hidden_state
        if hidden.requires_grad:
            hidden.register_hook(self._loss_ends)
        self._moment, self._in_loss = "loss", True
        if self._copies_learned:
            output.last_hidden_state = hidden.clone()

    def _loss_ends(self, gradient: Tensor) -> None:
        self._in_loss = False
        self._moment = self._backward_of(self._last)

    def _layer_begins(self, index: int) -> Callable[..., None]:
        def ended(gradient: Tensor) -> None:
            self._moment = self._backward_of(index - 1)

        def begins(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and inputs[0].requires_grad:
                inputs[0].register_hook(ended)

        return begins

    def _backward_of(self, index: int) -> str:
        if index in (0, self._last):
            return f"backward of the {'first' if index == 0 else 'last'} layer"
        return "backward of the embedding" if index < 0 else BETWEEN

    def _optimizer_begins(self, *_: Any) -> None:
        self._moment = "optimizer"


def _split(snapshot: Mapping[Any, int]) -> Split:
    return Split(
        parameters=snapshot[_MemRefType.PARAM],
        gradients=snapshot[_MemRefType.GRAD],
        optimizer=snapshot[_MemRefType.OPT],
        activations=snapshot[_MemRefType.ACT] + snapshot[_MemRefType.TEMP] + snapshot[_MemRefType.BUFFER],
        loss=snapshot[_MemRefType.OTH],
    )


def decoder_layers(backbone: nn.Module) -> nn.ModuleList:
    """The decoder layers of a backbone, in order."""
    layers = getattr(backbone, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise TraceError(f"{type(backbone).__name__} keeps its layers elsewhere than in `layers`: not traced")
    return layers


# --------------------------------------------------------------------------- more layers than are traced
def _layer_count(config: PretrainedConfig) -> int:
    return int(config.get_text_config().num_hidden_layers)


def cut_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same model with its first ``layers`` layers; lists with one entry per layer are cut as well."""
    cut = deepcopy(config)
    text = cut.get_text_config()
    whole = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return cut


def _layers_alike(config: PretrainedConfig) -> bool:
    """Whether all layers have the same shapes: as many parameters in each."""
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(config)
    shapes = {
        tuple((name, tuple(weight.shape)) for name, weight in layer.named_parameters())
        for layer in decoder_layers(model.base_model)
    }
    return len(shapes) == 1 and len(set(getattr(config.get_text_config(), "layer_types", None) or [0])) == 1


def _on_a_line(cuts: list[dict[str, Split]]) -> bool:
    two, three, four = cuts
    if not two.keys() == {*three} - {BETWEEN} == {*four} - {BETWEEN}:
        return False
    bends = (two[name].total - 2 * three[name].total + four[name].total for name in two)
    slopes = (four[name].total - two[name].total for name in two)
    return all(abs(bend) <= 1e-3 * abs(slope) for bend, slope in zip(bends, slopes, strict=True))


def _extrapolated(cuts: list[dict[str, Split]], layers: int) -> dict[str, Split]:
    """Each moment along its own line; what lies between the first and the last layer lies between their moments."""
    two, _, four = cuts
    steps = (layers - FEW[0]) / (FEW[-1] - FEW[0])
    found = {}
    for name in two:
        low, high = asdict(two[name]), asdict(four[name])
        found[name] = Split(**{kind: round(low[kind] + steps * (high[kind] - low[kind])) for kind in low})
    return found
