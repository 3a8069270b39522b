"""A run against a server that is not ours: `transformers serve` with a small random Qwen2."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from agentkit import Agent, ApiError, Limits, RemoteModel

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_checkpoint(folder: Path) -> None:
    """Write a random model of two layers whose tokens are bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")  # type: ignore[no-untyped-call]
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        eos_token_id=fast.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, wait_until: Callable[..., None]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Serve the checkpoint; yield its name and the arguments of `RemoteModel` that reach it."""
    folder = tmp_path_factory.mktemp("served")
    save_checkpoint(folder)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(folder), "--device", "cpu"]
    log = (folder / "log").open("w")
    with (
        log,
        subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=log,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        ) as server,
    ):

        def answers() -> bool:
            assert server.poll() is None, (folder / "log").read_text()
            try:
                return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).status == 200)
            except (urllib.error.URLError, OSError):
                return False

        try:
            wait_until(answers, "the server to answer", timeout_s=120)
            yield str(folder), {"base_url": f"http://127.0.0.1:{port}/v1", "api_key": "none"}
        finally:
            server.kill()


@pytest.mark.anyio
async def test_a_run_against_transformers_serve(served: tuple[str, dict[str, Any]]) -> None:
    folder, where = served
    async with RemoteModel(f"openai:{folder}", **where) as model:
        agent = Agent(model, [], system="Be brief.", effort="none", limits=Limits(max_tokens_per_turn=24))
        result = await agent.run("Say hello.")
    assert result.status in ("limit", "answered", "no_answer")
    assert 0 < result.usage.sampled_tokens <= 24
    assert result.usage.prompt_tokens > len("Say hello.")
    said = result.trajectory.messages[-1]
    assert said.role == "assistant" and said.content


@pytest.mark.anyio
async def test_a_model_that_the_server_lacks(served: tuple[str, dict[str, Any]]) -> None:
    with pytest.raises(ApiError, match="no-such-model"):
        await Agent(RemoteModel("openai:no-such-model", **served[1]), [], effort="none").run("Say hello.")
