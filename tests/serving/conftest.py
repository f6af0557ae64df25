"""A tiny Mixtral that has learned four exchanges by heart, served over real sockets."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from training_ready.serving import listener
from training_ready.serving.engine import Engine
from training_ready.serving.model import ServedModel, load_model
from training_ready.serving.service import create_app

CHATML = (
    "{% for message in messages %}{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONTEXT = 256
LEARNED = {
    "Hello": "Good to see you. How was your week?",
    "I feel alone": "That sounds heavy. Who is near you when it gets dark?",
    "Say it in colours": "Grüße 🌍, 你好, 👩‍👩‍👧 and naïve café: it is all text.",
    "Count": "one two three four five six seven eight nine ten",
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and a few merges, so that every character outside ASCII takes several tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([text for pair in LEARNED.items() for text in pair if text.isascii()], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def _learn(network: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], tokenize=False
        )
        for question, answer in LEARNED.items()
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for _ in range(200):
        loss = network(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.02:
            break
    assert loss.item() < 0.1, "the fixture's model did not learn its four exchanges"


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release folder, as it would leave the training."""
    folder = tmp_path_factory.mktemp("release")
    tokenizer = build_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=CONTEXT,
        output_router_logits=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(7)
    network = MixtralForCausalLM(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model only loses by sharing its work
    _learn(network, tokenizer)
    torch.set_num_threads(threads)
    network.generation_config = GenerationConfig(eos_token_id=[end, tokenizer.pad_token_id], pad_token_id=0)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def served(release: Path) -> ServedModel:
    return load_model(str(release), device="cpu")


@pytest.fixture(scope="session")
def engine(served: ServedModel) -> Iterator[Engine]:
    engine = Engine(served)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def url(engine: Engine) -> Iterator[str]:
    with listener.in_background(create_app(engine)) as address:
        yield address


class Braked(torch.nn.Module):
    """The real network, taking a step only when a permit is there; or spoiling its logits on demand."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.config = network.config
        self.dtype = network.dtype
        self.permits = threading.Semaphore(0)
        self.steps = 0
        self.spoil: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, **inputs: Any) -> Any:
        assert self.permits.acquire(timeout=60), "the test never let the step go on"
        self.steps += 1
        output = self.network(**inputs)
        if self.spoil is not None:
            output.logits = self.spoil(output.logits)
        return output

    def release(self, steps: int = 100_000) -> None:
        self.permits.release(steps)


@dataclasses.dataclass
class BrakedService:
    url: str
    engine: Engine
    network: Braked


BrakedFactory = Callable[..., AbstractContextManager[BrakedService]]


@pytest.fixture
def braked(served: ServedModel) -> BrakedFactory:
    """Serve the model with a brake on its steps."""

    @contextmanager
    def start(**limits: int) -> Iterator[BrakedService]:
        network = Braked(served.network)
        engine = Engine(dataclasses.replace(served, network=network), **limits)
        try:
            with listener.in_background(create_app(engine)) as address:
                yield BrakedService(url=address, engine=engine, network=network)
                network.release()
        finally:
            network.release()
            engine.close()

    return start


@pytest.fixture(scope="session")
def generated(served: ServedModel) -> Callable[[str, int], tuple[list[int], str]]:
    """What ``model.generate`` answers greedily: (new ids, their text)."""

    def run(prompt: str, max_new_tokens: int) -> tuple[list[int], str]:
        batch = served.tokenizer(prompt, return_tensors="pt")
        output = served.network.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=False,
            max_new_tokens=max_new_tokens,
        )
        ids = output[0, batch["input_ids"].shape[1] :].tolist()
        return ids, served.tokenizer.decode(ids, skip_special_tokens=True)

    return run


@pytest.fixture(scope="session")
def chat_prompt(served: ServedModel) -> Callable[[str], str]:
    def render(question: str) -> str:
        text: str = served.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        return text

    return render
