"""The engine: the model's own answers, one request's rules only, and a worker that outlives every failure."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from training_ready.serving.decoding import Ending, Generation, Step
from training_ready.serving.engine import Engine
from training_ready.serving.errors import GenerationFailed, GenerationStopped, Overloaded, RequestError
from training_ready.serving.model import ServedModel
from training_ready.serving.sampling import Sampling
from training_ready.serving.text import Token

GREEDY = Sampling()


def collect(engine: Engine, generation: Generation) -> tuple[list[Token], Ending]:
    events: queue.Queue[Step | RequestError] = queue.Queue()
    engine.submit(generation, events.put)
    return finish(events)


def finish(events: queue.Queue[Step | RequestError]) -> tuple[list[Token], Ending]:
    tokens = []
    while True:
        event = events.get(timeout=60)
        if isinstance(event, RequestError):
            raise event
        tokens.append(event.token)
        if event.ending is not None:
            return tokens, event.ending


def ask(model: ServedModel, prompt: str, *, tokens: int = 40, **rest: Any) -> Generation:
    rest.setdefault("sampling", GREEDY)
    return Generation(prompt_ids=model.tokenizer(prompt)["input_ids"], max_new_tokens=tokens, **rest)


@pytest.mark.parametrize(
    "prompt", ["Hello", "I feel", "z", "Grüße 🌍", "one two three " * 9, "<|im_start|>user\n"]
)
def test_greedy_is_generate_token_for_token(
    engine: Engine, served: ServedModel, generated: Callable[[str, int], tuple[list[int], str]], prompt: str
) -> None:
    tokens, ending = collect(engine, ask(served, prompt, tokens=60))
    ids, text = generated(prompt, 60)
    assert [token.id for token in tokens] == ids
    assert ending.text == text
    assert ending.generated_tokens == len(ids)


def test_each_end_token_ends_the_answer(served: ServedModel, chat_prompt: Callable[[str], str]) -> None:
    prompt = chat_prompt("Count")
    full = Engine(served)
    tokens, ending = collect(full, ask(served, prompt, tokens=100))
    full.close()
    assert ending.reason == "eos_token"
    assert ending.text == "one two three four five six seven eight nine ten"
    assert tokens[-1].special
    assert tokens[-1].text == "<|im_end|>"
    other = Engine(dataclasses.replace(served, end_ids=served.end_ids | {tokens[5].id}))
    shorter, ending = collect(other, ask(served, prompt, tokens=100))
    other.close()
    first = next(place for place, token in enumerate(tokens, 1) if token.id == tokens[5].id)
    assert (ending.reason, len(shorter)) == ("eos_token", first)


def test_logprobs_are_those_of_the_model(engine: Engine, served: ServedModel) -> None:
    generation = ask(served, "Good to", tokens=12, top_n_tokens=3, prefill_details=True)
    tokens, ending = collect(engine, generation)
    ids = torch.tensor([[*generation.prompt_ids, *(token.id for token in tokens)]])
    with torch.inference_mode():
        expected = served.network(input_ids=ids).logits.float().log_softmax(-1)[0]
    everything = [*ending.prefill, *tokens]
    assert everything[0].logprob is None
    for place, token in enumerate(everything[1:]):
        assert token.logprob == pytest.approx(expected[place, token.id].item(), abs=1e-4)
    for place, token in enumerate(tokens, len(ending.prefill) - 1):
        assert [each.id for each in token.top] == expected[place].topk(3).indices.tolist()


def test_a_seed_repeats_and_another_differs(engine: Engine, served: ServedModel) -> None:
    def sample(seed: int) -> list[int]:
        sampling = Sampling(do_sample=True, temperature=3.0, seed=seed)
        return [token.id for token in collect(engine, ask(served, "x", sampling=sampling))[0]]

    assert sample(11) == sample(11)
    assert len({tuple(sample(seed)) for seed in range(4)}) == 4


def test_filters_narrow_the_choice_to_the_greedy_one(engine: Engine, served: ServedModel) -> None:
    greedy = [token.id for token in collect(engine, ask(served, "I feel"))[0]]
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-30}, {"temperature": 1e-9, "top_k": 5}):
        sampling = Sampling(do_sample=True, seed=3, **narrow)
        assert [token.id for token in collect(engine, ask(served, "I feel", sampling=sampling))[0]] == greedy


def test_penalties_forbid_what_was_said(engine: Engine, served: ServedModel) -> None:
    prompt = "one two three four"
    repeats = [token.id for token in collect(engine, ask(served, prompt, tokens=12))[0]]
    assert len(set(repeats)) < len(repeats), "the premise: without a penalty the answer repeats itself"
    used = set(served.tokenizer(prompt)["input_ids"])
    sampling = Sampling(repetition_penalty=1e6)
    tokens, _ = collect(engine, ask(served, prompt, tokens=12, sampling=sampling))
    ids = [token.id for token in tokens]
    assert not used & set(ids)
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("keep_stop", [True, False])
def test_a_stop_string_across_tokens_is_kept_or_cut_as_a_whole(
    engine: Engine, served: ServedModel, chat_prompt: Callable[[str], str], keep_stop: bool
) -> None:
    generation = ask(served, chat_prompt("Count"), tokens=80, stop=("ur fi", "never"), keep_stop=keep_stop)
    tokens, ending = collect(engine, generation)
    assert ending.reason == "stop_sequence"
    assert ending.text == "one two three fo" + ("ur fi" if keep_stop else "")
    assert "".join(token.text for token in tokens) == ending.text


def test_stop_string_that_never_completes_leaves_the_text_whole(
    engine: Engine, served: ServedModel, chat_prompt: Callable[[str], str]
) -> None:
    tokens, ending = collect(engine, ask(served, chat_prompt("Count"), tokens=80, stop=("ten and more",)))
    assert ending.text.endswith("nine ten")
    assert "".join(token.text for token in tokens if not token.special) == ending.text


def test_answers_run_in_turn_and_not_one_after_the_other(braked: Any, served: ServedModel) -> None:
    with braked(max_active=2) as service:
        order: queue.Queue[tuple[str, Step | RequestError]] = queue.Queue()
        for name in "ab":
            service.engine.submit(
                ask(served, name, tokens=6), lambda event, name=name: order.put((name, event))
            )
        service.network.release()
        names, ended = "", 0
        while ended < 2:
            name, event = order.get(timeout=60)
            assert isinstance(event, Step)
            names += name
            ended += event.ending is not None
    assert names.index("b") < names.rindex("a")


def test_more_than_the_limit_is_refused_and_a_cancelled_one_makes_room(
    braked: Any, served: ServedModel
) -> None:
    with braked(max_concurrent_requests=2, max_active=1) as service:
        first: queue.Queue[Step | RequestError] = queue.Queue()
        service.engine.submit(ask(served, "a", tokens=3), first.put)
        second = service.engine.submit(ask(served, "b", tokens=3), lambda _: None)
        with pytest.raises(Overloaded):
            service.engine.submit(ask(served, "c"), lambda _: None)
        second.cancel()
        service.network.release()
        finish(first)
        assert collect(service.engine, ask(served, "d", tokens=2))[1].generated_tokens == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_numbers_fail_one_request_only(
    braked: Any, served: ServedModel, value: float
) -> None:
    with braked() as service:
        service.network.release()
        service.network.spoil = lambda logits: logits.index_fill(-1, torch.tensor([5]), value)
        with pytest.raises(GenerationFailed, match="1 of 290 logits are not finite"):
            collect(service.engine, ask(served, "Hello"))
        service.network.spoil = None
        assert service.engine.healthy
        assert collect(service.engine, ask(served, "Hello"))[1].generated_tokens > 0


def test_an_unforeseen_failure_is_reported_and_survived(braked: Any, served: ServedModel) -> None:
    def fall_over(_: torch.Tensor) -> torch.Tensor:
        raise MemoryError("no more")

    with braked() as service:
        service.network.release()
        service.network.spoil = fall_over
        with pytest.raises(GenerationFailed, match="MemoryError: no more"):
            collect(service.engine, ask(served, "Hello"))
        service.network.spoil = None
        assert collect(service.engine, ask(served, "Hello"))[1].generated_tokens > 0


def test_frequency_and_presence_penalties_count_the_answer_only(engine: Engine, served: ServedModel) -> None:
    prompt = "one two three four"
    plain = [token.id for token in collect(engine, ask(served, prompt, tokens=12))[0]]
    for penalty in ({"frequency_penalty": 1e4}, {"presence_penalty": 1e4}):
        tokens, _ = collect(engine, ask(served, prompt, tokens=12, sampling=Sampling(**penalty)))
        assert tokens[0].id == plain[0]
        assert len({token.id for token in tokens}) == len(tokens)


def test_closing_tells_everyone_who_waits(braked: Any, served: ServedModel) -> None:
    with braked(max_active=1) as service:
        events: list[queue.Queue[Step | RequestError]] = [queue.Queue(), queue.Queue()]
        for each in events:
            service.engine.submit(ask(served, "a", tokens=200), each.put)
        closing = threading.Thread(target=service.engine.close)
        closing.start()
        refused = False
        while not refused:  # the worker stands at the brake, so nothing but closing ends this
            try:
                service.engine.submit(ask(served, "b"), lambda _: None).cancel()
            except GenerationStopped:
                refused = True
            except Overloaded:
                pass
        service.network.release()
        closing.join(timeout=60)
        for each in events:
            with pytest.raises(GenerationStopped):
                finish(each)
        assert not service.engine.healthy
