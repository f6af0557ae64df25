"""Do Jinja and minijinja write the same prompt from a normalised template?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import minijinja
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template
from trl.data_utils import prepare_multimodal_messages

from training_ready.release.export import ExportError
from training_ready.release.targets.chat_template import methods_as_calls, normalise, taking_text
from training_ready.release.targets.conversations import CONVERSATIONS
from training_ready.release.targets.pinned import cache_folder, pinned_folder, pinned_python, run_pinned
from training_ready.release.targets.proof import compare_prompts, prompts_of
from training_ready.release.targets.render import TemplateError, jinja_renderer, wants_parts
from training_ready.release.targets.verify_tgi import rendered, template_jobs

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
SHIPPED = sorted(
    Path(str(path))
    for path in (resources.files("trl") / "chat_templates").iterdir()
    if path.name.endswith(".jinja")
)
# They know lists of parts only: a turn that is plain text they drop or refuse.
PICTURES = {"idefics3", "llava_next", "smolvlm"}


def raise_exception(message: str) -> None:
    raise ValueError(message)


def in_minijinja(template: str, values: Mapping[str, Any]) -> str | None:
    environment: Any = minijinja.Environment(pycompat=True)
    environment.add_function("raise_exception", raise_exception)
    environment.add_function("strftime_now", lambda form: datetime.now().strftime(form))
    try:
        return str(environment.render_str(template, **values))
    except (minijinja.TemplateError, ValueError):
        return None


def in_jinja(template: str, **special: str) -> str:
    return jinja_renderer(template, special)(CONVERSATIONS["multi-turn"])


def both(template: str) -> tuple[str, str | None]:
    messages = CONVERSATIONS["multi-turn"]
    return in_jinja(template), in_minijinja(normalise(template), {"messages": messages, "tools": None})


@pytest.mark.parametrize(
    "template",
    [
        "a\n  {% if true %}\n  b\n  {% endif %}\nc\n",
        "a\n  {%+ if true +%}\n  b\n  {%- endif -%}\n c",
        "{# told #}\n\n{{- 'x' }}\n{{ 'y' -}}  \n z\n\n",
        "{% for m in messages %}\n\t{{ m.role }}\n{% endfor %}\n",
        "{% for m in messages[::-1] %}{{ m['role'] }},{% endfor %}{{ messages[::-1][0].content }}",
        "{% for m in messages %}{% generation %}\n{{ m.content }}\n{% endgeneration %}\n{% endfor %}",
        "{{ '{% generation %}' }}{{ \"a\\tb\\x41\\u00e9 'q'\" }}",
        "{% raw %}{{ left }} {% alone %}{% endraw %} { {{- 'x' }} {{ '}' }}",
        "{% if tools is iterable and tools|length > 0 %}T{% else %}F{% endif %}",
        "{% if messages[0].content is iterable %}T{% endif %}{% if messages[0].content is not sequence %}N{% endif %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{{ messages[-1].content.strip().split('\n')[-1] }}|{{ 'a' 'b' }}",
    ],
)
def test_whitespace_strings_and_slices_mean_the_same_in_both_engines(template: str) -> None:
    expected, got = both(template)
    assert got == expected
    assert in_jinja(normalise(template)) == expected


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                *(" ", "  ", "\n", "\t", "a", "{", "}", "%", "#", "'", "{{ 1 }}", "{{- 2 -}}", "{# c #}"),
                *(
                    "{% if true %}",
                    "{%- if true -%}",
                    "{%+ if true +%}",
                    "{% endif %}",
                    "{%- endif %}",
                    "{% endif -%}",
                ),
            ]
        ),
        max_size=14,
    )
)
def test_any_mixture_of_tags_and_whitespace_means_the_same(pieces: list[str]) -> None:
    template = "".join(pieces)
    try:
        expected = in_jinja(template)
    except (TemplateError, ValueError):
        return
    assert in_minijinja(normalise(template), {}) == expected


def test_names_that_the_engine_does_not_pass_become_literals() -> None:
    template = "{{ bos_token }}{{ eos_token }}{{ messages[0].eos_token }}{% if pad_token %}!{% endif %}"
    written = normalise(template, {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "é"})
    values = {"messages": [{"eos_token": "attribute"}], "bos_token": None, "eos_token": "other"}
    assert in_minijinja(written, values) == "<|im_end|>attribute!"


def test_methods_become_calls_with_their_whole_operand() -> None:
    written = methods_as_calls("{{ (a.b[0] + 'x').strip().split('-')[-1] }}", ("strip", "split"), "f")
    assert re.sub(r"\s+", "", written) == '{{f(f((a.b[0]+"x"),"strip"),"split","-")[-1]}}'


def test_what_is_not_jinja_is_refused() -> None:
    with pytest.raises(ExportError, match="not Jinja"):
        normalise("{% if 'open %}")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_templates_that_trl_ships_render_alike(path: Path) -> None:
    template = path.read_text(encoding="utf-8")
    trained = prompts_of(template, SPECIAL)
    written = normalise(taking_text(template, SPECIAL))
    values = {**SPECIAL, "tools": None, "add_generation_prompt": True}
    served = {
        name: in_minijinja(written, {"messages": turns, **values}) for name, turns in CONVERSATIONS.items()
    }
    assert served == trained
    assert prompts_of(written, SPECIAL) == trained
    assert compare_prompts(trained, served).passed
    assert wants_parts(template, SPECIAL) == (path.stem.removesuffix("_training") in PICTURES)


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_a_template_of_parts_is_given_them_as_trl_gives_them(name: str) -> None:
    template = next(path for path in SHIPPED if path.stem == name).read_text(encoding="utf-8")
    for messages in CONVERSATIONS.values():
        parts = prepare_multimodal_messages([dict(message) for message in messages])
        values = {"add_generation_prompt": True, **SPECIAL}
        expected, _ = render_jinja_template(conversations=[parts], chat_template=template, **values)
        assert jinja_renderer(template, SPECIAL)(messages) == expected[0]
        written = normalise(taking_text(template, SPECIAL))
        assert in_minijinja(written, {"messages": parts, **values}) == expected[0]  # parts stay what they are
    assert CONVERSATIONS["multi-turn"][0]["content"] in in_jinja(template, **SPECIAL)


def all_shipped_render_in_the_routers_engine(python: Path) -> None:
    jobs = [
        template_jobs({"chat_template": normalise(taking_text(path.read_text(), SPECIAL)), **SPECIAL})
        for path in SHIPPED
    ]
    answers = run_pinned(
        python, {"folder": "", "templates": [job for templates in jobs for job in templates]}
    )
    assert answers["versions"]["minijinja"] == "2.8.0"
    count = len(CONVERSATIONS)
    different = [
        path.stem
        for place, path in enumerate(SHIPPED)
        if rendered(answers["rendered"][place * count : (place + 1) * count])
        != prompts_of(path.read_text(), SPECIAL)
    ]
    assert not different


@pytest.mark.slow
def test_templates_that_trl_ships_render_alike_in_minijinja_2_8() -> None:
    all_shipped_render_in_the_routers_engine(pinned_python(cache_folder()))


@pytest.mark.skipif(
    not pinned_folder(cache_folder()).exists(), reason="the environment of TGI's releases is not built"
)
def test_templates_render_alike_in_minijinja_2_8_where_it_is_built() -> None:
    all_shipped_render_in_the_routers_engine(pinned_python(cache_folder()))
