"""What looks like a secret: a recipe is saved beside every checkpoint and printed in the card, so none may be in it."""

from __future__ import annotations

import re
from dataclasses import replace

from training_ready.recipe.faults import Fault
from training_ready.recipe.tree import Mapping, Node, Scalar, Sequence

_NAME = re.compile(
    r"(^|_)(tokens?|secrets?|passwords?|passwd|passphrase|credentials?|auth|bearer"
    r"|(api|access|secret|private|signing|encryption)_?key(_id)?|apikey)$",
    re.IGNORECASE,
)
_VOCABULARY = re.compile(
    r"^((additional_)?special|added|extra|bos|eos|pad|unk|sep|cls|mask|eot|eom|boi|eoi|image|video|audio|vision_start"
    r"|vision_end|forced_bos|forced_eos|decoder_start|max|min|num|max_new|total)_tokens?$"
)
_VALUES = {
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{16,}"),
    "an AWS access key": re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"),
    "a GitHub token": re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})"),
    "a GitLab token": re.compile(r"\bglpat-[A-Za-z0-9_\-]{16,}"),
    "an API key": re.compile(r"\bsk-[A-Za-z0-9_\-]{20,}"),
    "a Slack token": re.compile(r"\bxox[abprs]-[A-Za-z0-9\-]{10,}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a signed web token": re.compile(r"\beyJ[A-Za-z0-9_\-]{10,}\.eyJ[A-Za-z0-9_\-]{10,}"),
    "a URL with a password": re.compile(r"://[^/\s:@]+:[^/\s@]+@"),
    "a signed URL": re.compile(r"[?&](X-Amz-Signature|X-Amz-Credential|Signature|sig)=", re.IGNORECASE),
}
_ADVICE = "secrets come from the environment (HF_TOKEN, OVH_S3_*), never from a recipe; remove it"


def is_secret_name(name: str) -> bool:
    """Whether a key or variable is named like a secret; ``eos_token`` and its kin are words of a vocabulary."""
    return bool(_NAME.search(name)) and not _VOCABULARY.match(name)


def secret_in(text: str) -> str | None:
    """What kind of secret ``text`` holds, or None."""
    return next((what for what, pattern in _VALUES.items() if pattern.search(text)), None)


def without_secrets(tree: Mapping) -> tuple[Mapping, list[Fault]]:
    """The tree with every secret taken out, and one fault for each. No message repeats a secret's value."""
    faults: list[Fault] = []
    return _cleaned_mapping(tree, "", faults), faults


def _cleaned(node: Node, path: str, faults: list[Fault]) -> Node:
    if isinstance(node, Mapping):
        return _cleaned_mapping(node, path, faults)
    if isinstance(node, Sequence):
        items = [_cleaned(child, f"{path}[{index}]", faults) for index, child in enumerate(node.items)]
        return replace(node, items=items)
    message = _message(path, node)
    if message is None:
        return node
    faults.append(Fault(node.origin, path, message))
    return replace(node, text="", faulty=True)


def _cleaned_mapping(node: Mapping, path: str, faults: list[Fault]) -> Mapping:
    entries: dict[str, Node] = {}
    for name, child in node.entries.items():
        what = secret_in(name)
        if what is None:
            entries[name] = _cleaned(child, f"{path}.{name}" if path else name, faults)
        else:
            faults.append(Fault(child.origin, path, f"has a key that looks like {what}: {_ADVICE}"))
    return replace(node, entries=entries)


def _message(path: str, leaf: Scalar) -> str | None:
    """Why the leaf at ``path`` is a secret, or None. A boolean or a null is none, whatever it is called."""
    if leaf.faulty:
        return None
    what = secret_in(leaf.text)
    if what is not None:
        return f"looks like {what}: {_ADVICE}"
    name = re.sub(r"\[\d+\]", "", path).rpartition(".")[2]
    harmless = leaf.is_null or (leaf.plain and leaf.text.lower() in ("true", "false"))
    return f"is named like a secret: {_ADVICE}" if is_secret_name(name) and not harmless else None
