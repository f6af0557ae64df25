"""May the release be pushed where the recipe says, and would its card be complete?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from training_ready.check.context import CheckContext
from training_ready.check.finding import Finding, failed, not_run, passed, warned
from training_ready.release.card import require_words
from training_ready.release.connection import PublishError, hub_api, hub_endpoint, is_public_hub, token_for
from training_ready.release.facts import CardError
from training_ready.release.publish_read_back import record_at, remote_files
from training_ready.release.publish_replace import holds_another, identity

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_WRITE_ROLES = ("write", "admin")
_SECONDS = 10


def probe_hub(context: CheckContext) -> list[Finding]:
    """Endpoint, token, right to write, name; and the texts that a card needs."""
    findings = [*_card(context)]
    repo_id = context.recipe.release.repo_id
    if repo_id is None:
        return [*findings, not_run("the recipe names no release.repo_id, so nothing would be pushed")]
    if context.offline:
        return [
            *findings,
            not_run("the hub needs the network, and this check is --offline", key="release.repo_id"),
        ]
    try:
        endpoint = hub_endpoint()
    except PublishError as error:
        return [*findings, failed(str(error), key="release.repo_id", fix="correct HF_ENDPOINT")]
    return [*findings, *_answers(context, endpoint, token_for(endpoint), repo_id)]


def _card(context: CheckContext) -> Iterator[Finding]:
    try:
        require_words(context.recipe.release)
    except CardError as error:
        say = warned if context.recipe.release.repo_id is None else failed
        later = "add it now; the recipe of a finished run is completed by `training-ready release build RUN FOLDER "
        yield say(str(error), key="release", fix=f"{later}release.license=... release.summary=...`")


def _answers(context: CheckContext, endpoint: str, token: str | None, repo_id: str) -> Iterator[Finding]:
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        with hub_api(endpoint, token) as api:
            yield from _permission(context, api, endpoint, repo_id)
    except OfflineModeIsEnabled:
        yield failed(
            "HF_HUB_OFFLINE is set, so the hub cannot be asked", key="release.repo_id", fix="unset it"
        )
    except (httpx2.TransportError, ConnectionError, httpx2.InvalidURL) as error:
        yield failed(
            f"no hub answers at {endpoint} ({error})",
            key="release.repo_id",
            fix="start it (`training-ready hub serve`), or correct HF_ENDPOINT",
        )
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = (error.server_message or str(error)).strip().splitlines()[0].rstrip(".")
        fix = (
            "set HF_TOKEN to a token of that hub with write access"
            if status in (401, 403)
            else "ask its operator"
        )
        yield failed(f"{endpoint} answers HTTP {status}: {said}", key="release.repo_id", fix=fix)


def _permission(context: CheckContext, api: HfApi, endpoint: str, repo_id: str) -> Iterator[Finding]:
    from huggingface_hub.errors import LocalTokenNotFoundError

    open_to_all = api.token is False  # a hub of one's own may ask for no token
    try:
        who = _everybody(endpoint) if open_to_all else api.whoami()
    except LocalTokenNotFoundError:
        yield failed(f"no token for {endpoint}", key="release.repo_id", fix="export HF_TOKEN")
        return
    name = str(who.get("name") or "everybody")
    owner = repo_id.partition("/")[0] if "/" in repo_id else name
    role = (who.get("auth") or {}).get("accessToken", {}).get("role")
    if role is not None and role not in (*_WRITE_ROLES, "fineGrained"):
        yield failed(
            f"the token of {name} may only {role}", key="release.repo_id", fix="a token with the role write"
        )
        return
    yield from _owner(who, name, owner, endpoint)
    yield from _name(
        context, api, repo_id, f"{endpoint} lets {name} in" + (f", token role {role}" if role else "")
    )
    if role is None and open_to_all:
        yield warned(
            f"no token is set, and {endpoint} does not say whether everybody may write: the push will tell",
            key="release.repo_id",
            fix="export HF_TOKEN, if that hub gives out tokens",
        )


def _everybody(endpoint: str) -> dict[str, Any]:
    """What a hub says of a caller without a token: ours names a role, others need not."""
    import httpx2

    answer = httpx2.get(f"{endpoint}/api/whoami-v2", timeout=_SECONDS)
    try:
        said = answer.json() if answer.status_code == 200 else {}
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _owner(who: dict[str, Any], name: str, owner: str, endpoint: str) -> Iterator[Finding]:
    """On the public hub a name space is one's own or an organisation's; elsewhere the hub itself decides."""
    groups = {group.get("name"): group.get("roleInOrg") for group in who.get("orgs", [])}
    if (
        is_public_hub(endpoint)
        and owner != name
        and groups.get(owner) not in ("admin", "write", "contributor")
    ):
        yield failed(
            f"{name} may not write to {owner}; known: {name}, {', '.join(map(str, groups)) or 'no organisation'}",
            key="release.repo_id",
            fix=f"release.repo_id: {name}/NAME, or a token of {owner}",
        )


def _name(context: CheckContext, api: HfApi, repo_id: str, known: str) -> Iterator[Finding]:
    """A push replaces what main holds: only a repository of ours, or a new or empty one, may be pushed to."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        there = api.model_info(repo_id)
    except RepositoryNotFoundError as error:
        if error.response.status_code in (401, 403):
            raise  # a hub with tokens says so of every name to a stranger
        yield passed(f"{known}; {repo_id} is free and would be created", repo_id=repo_id)
        return
    files = {sibling.rfilename for sibling in there.siblings or []} - {".gitattributes"}
    if not files:
        yield passed(f"{known}; {repo_id} is there and empty", repo_id=repo_id)
    elif "training-ready" in _tags(api, there, repo_id, files):
        yield from _another(context, api, repo_id, str(there.sha))
        yield passed(f"{known}; {repo_id} holds an earlier release, which the push replaces", repo_id=repo_id)
    else:
        yield failed(
            f"{repo_id} holds {len(files)} files that are no release of this package, and the push would replace them",
            key="release.repo_id",
            fix="another name",
        )


def _another(context: CheckContext, api: HfApi, repo_id: str, revision: str) -> Iterator[Finding]:
    """What `release publish` will not replace unasked."""
    recipe = context.recipe
    files = remote_files(api, repo_id, revision)
    found = record_at(api, repo_id, revision, files)
    base = recipe.trl.get("model_name_or_path")
    ours = identity(recipe.name, str(base) if base else None, recipe.data.target_role)
    said = holds_another(found, len(files), ours)
    if said is not None:
        yield warned(
            f"{repo_id} holds {said}",
            key="release.repo_id",
            fix="another name; `release publish --replace` if it shall go",
        )


def _tags(api: HfApi, there: Any, repo_id: str, files: set[str]) -> list[str]:
    if there.tags:
        return list(there.tags)
    if "README.md" not in files:
        return []
    from huggingface_hub import ModelCard

    text = api.hf_hub_download(repo_id, "README.md", revision=there.sha)
    return list(ModelCard.load(text, ignore_metadata_errors=True).data.tags or [])
