"""What does the template of training write? The reference that every engine is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from training_ready.release.targets.conversations import Messages


class TemplateError(ValueError):
    """The template refused the conversation: a role it does not know, say."""


def jinja_renderer(template: str, special: Mapping[str, str]) -> Callable[[Messages], str]:
    """A function that renders as `apply_chat_template(..., add_generation_prompt=True, tokenize=False)` does.

    It raises TemplateError when the template refuses a conversation.
    """
    from jinja2 import TemplateError as JinjaError
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(messages: Messages) -> str:
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

    return render
