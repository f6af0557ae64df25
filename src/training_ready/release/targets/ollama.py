"""What does ollama need beside the GGUF? A Modelfile with the chat template in Go's language.

Ollama renders Go templates and ignores the Jinja one in the file. A template that writes each turn as prefix, text,
suffix can be said in both; whether it does is found by rendering, and refused when it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from training_ready.release.targets.conversations import CONVERSATIONS, Messages
from training_ready.release.targets.render import TemplateError, jinja_renderer
from training_ready.release.targets.table import refuse
from training_ready.release.targets.tokenizer_files import SPECIAL, chat_template, read_json, text

_PROBE = "\ue000"
Renderer = Callable[[Messages], str]


@dataclass(kw_only=True, slots=True, frozen=True)
class Turns:
    """A template as ollama can say it: what stands around each role's text, before all turns and after them."""

    start: str
    frames: Mapping[str, tuple[str, str]]
    answer: str

    def render(self, messages: Messages) -> str:
        turns = (
            "{1}{0}{2}".format(message["content"], *self.frames[message["role"]]) for message in messages
        )
        return self.start + "".join(turns) + self.answer

    def as_go(self) -> str:
        """The same as a Go template of ollama."""
        roles = [
            f'{{{{ if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{ end }}}}'
            for role, (before, after) in self.frames.items()
        ]
        return f"{self.start}{{{{ range .Messages }}}}{''.join(roles)}{{{{ end }}}}{self.answer}"


def modelfile(release: Path, weights: str) -> str:
    """The Modelfile for `weights`, the GGUF file beside it.

    Raises ExportError when the chat template is more than prefix, text and suffix per turn.
    """
    settings = read_json(release / "tokenizer_config.json")
    special = {name: text(settings[name]) for name in SPECIAL if settings.get(name)}
    turns = turns_of(jinja_renderer(chat_template(release), special))
    tokens = {
        token["id"]: token["content"] for token in read_json(release / "tokenizer.json")["added_tokens"]
    }
    ends = read_json(release / "generation_config.json")["eos_token_id"]
    stops = "".join(f'PARAMETER stop "{tokens[number]}"\n' for number in ends if number in tokens)
    return f'FROM ./{weights}\nTEMPLATE """{turns.as_go()}"""\n{stops}'


def turns_of(render: Renderer) -> Turns:
    """Read prefix and suffix of every role off the rendered text, then compare on whole conversations."""
    user, answer = ({"role": role, "content": _PROBE} for role in ("user", "assistant"))
    system = {"role": "system", "content": _PROBE}
    try:
        one, two = render([user]), render([user, user])
        three, four = render([user, answer, user]), render([system, user])
    except TemplateError as error:
        raise refuse(
            "ollama", "this chat template", f"it does not render every role: {error}", "gguf"
        ) from error
    first, rest = one.split(_PROBE, 1)[0], two.split(_PROBE)
    # In "start prefix _ suffix prefix _ suffix answer" the middle is suffix + prefix, the end is suffix + answer.
    for cut in range(len(rest[1]) + 1):
        before, after = rest[1][cut:], rest[1][:cut]
        if not (first.endswith(before) and rest[2].startswith(after)):
            continue
        start, end = first[: len(first) - len(before)], rest[2][len(after) :]
        said = three.split(_PROBE)
        told = four.split(_PROBE)
        frames = {
            "system": (told[0].removeprefix(start), told[1].removesuffix(before)),
            "user": (before, after),
            "assistant": (said[1].removeprefix(after), said[2].removesuffix(before)),
        }
        turns = Turns(start=start, frames=frames, answer=end)
        if _agree(turns, render):
            return turns
    raise refuse("ollama", "this chat template", "its turns are not prefix, text, suffix", "gguf")


def _agree(turns: Turns, render: Renderer) -> bool:
    words = [turns.start, turns.answer, *(part for frame in turns.frames.values() for part in frame)]
    if any("{{" in word or '"""' in word for word in words):
        return False
    try:
        return all(turns.render(messages) == render(messages) for messages in CONVERSATIONS.values())
    except TemplateError:
        return False
