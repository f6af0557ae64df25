"""The front door's commands of this room: ``serve`` and ``ask``."""

from __future__ import annotations

import os
from typing import Annotated

import typer

API_KEY = "TRAINING_READY_API_KEY"


def serve(
    model: Annotated[
        str, typer.Argument(help="A release: a local folder, or owner/name on the hub (HF_ENDPOINT).")
    ],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the hub repository.")] = None,
    host: Annotated[
        str, typer.Option(help=f"Address to listen on; beyond loopback needs {API_KEY}.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8080,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    max_concurrent_requests: Annotated[
        int, typer.Option(min=1, help="Waiting and running together; one more is answered 429.")
    ] = 128,
    max_active: Annotated[
        int, typer.Option(min=1, help="Answers that are computed in turn; each holds a cache.")
    ] = 4,
) -> None:
    """Answer questions from a released model through TGI's API and OpenAI's.

    With TRAINING_READY_API_KEY set, every request must carry it as a bearer token.

    Example: training-ready serve releases/quickstart --port 8080
    """
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from rich.console import Console
    from transformers.utils import logging as transformers_logging

    from training_ready.serving import listener
    from training_ready.serving.engine import Engine
    from training_ready.serving.model import load_model
    from training_ready.serving.service import create_app

    console = Console()
    if not console.is_terminal:
        disable_progress_bars()
        transformers_logging.disable_progress_bar()
    api_key = os.environ.get(API_KEY) or None
    with listener.bind(host, port, protected=api_key is not None) as listening:
        with console.status(f"Loading {model}"):
            served = load_model(model, revision=revision, device=device)
        ends = ", ".join(repr(served.tokenizer.decode([number])) for number in sorted(served.end_ids))
        console.print(
            f"{model}{'@' + served.commit if served.commit else ''}: {served.dtype} on {served.device}, context "
            f"{served.max_total_tokens} tokens, answers end at {ends or 'their length only'}",
            markup=False,
            soft_wrap=True,
        )
        engine = Engine(served, max_concurrent_requests=max_concurrent_requests, max_active=max_active)
        try:
            listener.run(
                create_app(engine, api_key=api_key),
                listening,
                lambda: console.print(f"Ready: {listener.url_of(listening)}", markup=False, soft_wrap=True),
            )
        finally:
            engine.close()


def ask(
    url: Annotated[str, typer.Argument(help="Where the service answers, as `serve` printed it.")],
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, in tokens; without it, what fits the context.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
) -> None:
    """Ask a running service and print its answer (greedy, so the same question gets the same answer).

    Example: training-ready ask http://127.0.0.1:8080 "How do I get through this week?"
    """
    typer.echo(ask_service(url, prompt, max_new_tokens=max_new_tokens, system=system))


def ask_service(
    url: str, prompt: str, *, max_new_tokens: int | None = None, system: str | None = None
) -> str:
    """The service's greedy answer, through ``huggingface_hub.InferenceClient``.

    Raises:
        ServingError: nothing answers at ``url``, or it refuses.
    """
    from httpx2 import HTTPError  # the transport of huggingface_hub
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import HfHubHTTPError, InferenceTimeoutError

    from training_ready.serving.errors import ServingError

    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    # Without a token of its own the client would send the machine's Hugging Face token to this URL.
    client = InferenceClient(model=url, token=os.environ.get(API_KEY) or "none")
    try:
        reply = client.chat_completion(messages, max_tokens=max_new_tokens, temperature=0)
    except HfHubHTTPError as error:
        raise ServingError(f"{url} refused: {error}") from error
    except (HTTPError, InferenceTimeoutError, OSError) as error:
        raise ServingError(
            f"{url}: no answer ({error}). Start one with `training-ready serve MODEL`."
        ) from error
    return reply.choices[0].message.content or ""
