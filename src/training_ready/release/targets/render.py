"""What does the template of training write? The reference that every engine is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from training_ready.release.targets.conversations import Messages

_PROBE = "\ue000"


class TemplateError(ValueError):
    """The template refused the conversation: a role it does not know, say."""


def jinja_renderer(template: str, special: Mapping[str, str]) -> Callable[[Messages], str]:
    """A function that renders as `apply_chat_template(..., add_generation_prompt=True, tokenize=False)` does.

    Templates of models that see pictures may know lists of parts only; TRL gives them every text as one part
    (`prepare_multimodal_messages`), and so does this function. It raises TemplateError when the template refuses a
    conversation.
    """
    if wants_parts(template, special):
        return lambda messages: _render(template, special, [_in_parts(turn) for turn in messages])
    return lambda messages: _render(template, special, messages)


def wants_parts(template: str, special: Mapping[str, str]) -> bool:
    """Whether a text reaches the prompt as a list of parts, but not as it is."""

    def arrives(turn: Mapping[str, Any]) -> bool:
        try:
            return _PROBE in _render(template, special, [turn])
        except TemplateError:
            return False

    turn = {"role": "user", "content": _PROBE}
    return not arrives(turn) and arrives(_in_parts(turn))


def _in_parts(turn: Mapping[str, Any]) -> dict[str, Any]:
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]}


def _render(template: str, special: Mapping[str, str], messages: Sequence[Mapping[str, Any]]) -> str:
    from jinja2 import TemplateError as JinjaError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, _ = render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            chat_template=template,
            add_generation_prompt=True,
            **special,
        )
    except (JinjaError, TypeError, KeyError, ValueError) as error:
        raise TemplateError(str(error)) from error
    return str(rendered[0])
