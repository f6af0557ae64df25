"""What did the routers of this very forward say, and how exactly do they compute it?

The models of transformers hand their router logits out only together with a loss of their own, which pools layers
and fails for some families. Hooks on the routers get the same tensors from every family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training_ready.moe.families import MoEError, routed_layers
from training_ready.moe.monitor import in_backward


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """One forward: per sparse layer the router logits (T, E), with their gradient, and the choice (T, k)."""

    logits: list[Tensor]
    chosen: list[Tensor]


class RouterRecorder:
    """Keeps what the routers return while :meth:`recording`; holds nothing between forwards."""

    def __init__(self, model: nn.Module) -> None:
        self._routing: Routing | None = None
        for routed in routed_layers(model):
            routed.router.register_forward_hook(self._keep)

    @contextmanager
    def recording(self) -> Iterator[Routing]:
        """The routing of the forwards inside the block, layers in the order in which they ran.

        What activation checkpointing recomputes in the backward pass is not recorded again.
        """
        self._routing = Routing(logits=[], chosen=[])
        try:
            yield self._routing
        finally:
            self._routing = None

    def _keep(self, _router: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        if self._routing is not None and not in_backward():
            self._routing.logits.append(output[0])
            self._routing.chosen.append(output[2].detach())


class _InFloat32:
    """A router as its own ``forward`` sees it, with every floating tensor in fp32."""

    def __init__(self, router: nn.Module) -> None:
        self._router = router

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._router, name)
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def route_in_float32(model: nn.Module) -> None:
    """Make every router compute logits and weights in fp32, whatever the weights' and autocast's type.

    The routers keep their parameters as they are: a cast in the forward pass carries the gradient back.

    Raises :class:`MoEError` for a router that changes its input in place (phimoe), which must not see a copy.
    """
    for routed in routed_layers(model):
        if isinstance(routed.router, nn.Linear):
            raise MoEError(
                f"{routed.name}: {type(routed.router).__name__} adds noise to its input in place, so that the experts "
                "see it too; on an fp32 copy they would not. Leave moe.fp32_router out for this family."
            )
        routed.router.forward = _in_float32(routed.router)


def _in_float32(router: nn.Module) -> Callable[..., Any]:
    original: Any = type(router).forward

    def forward(hidden: Tensor, *rest: Any) -> Any:
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            return original(_InFloat32(router), hidden.float(), *rest)

    return forward
