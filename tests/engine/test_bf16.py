"""In bf16 the batch may tip a token over, but only where two tokens are tied."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from radix_backend.config import EngineConfig
from radix_backend.process import Reporter
from radix_backend.worker import create_worker
from tests.engine.sim import SimEngine
from tests.models.embedded import embedded_dir
from tests.models.ties import assert_equal_or_tied
from tests.models.tiny import load_reference

# What rounding may shift the difference of two logits by: bf16 keeps 8 bits, and these logits lie between 16 and 32.
TIE = 0.5
SUBJECTS = ("the sea", "bread", "a lighthouse", "prime numbers", "the moon", "an old clock", "rain", "chess")


@pytest.mark.model
def test_a_difference_between_batch_and_alone_is_a_tie() -> None:
    tokenizer = Tokenizer.from_file(str(embedded_dir() / "tokenizer.json"))
    texts = [f"{'Write about ' * (1 + i % 3)}{SUBJECTS[i % 8]}. " * (1 + i % 5) for i in range(16)]
    prompts = [tokenizer.encode(text).ids for text in texts]
    lengths = [4 + 5 * i % 11 for i in range(16)]
    config = EngineConfig(device="cpu", dtype="bfloat16", max_bs=16, context_len=512, kv_cache_memory=2**27)
    worker = create_worker(config, embedded_dir(), Reporter())
    try:
        engine = SimEngine(num_pages=worker.num_pages, page_size=16, max_bs=16, budget=256, worker=worker)
        together = [
            engine.add(prompt, length, temperature=0.0) for prompt, length in zip(prompts, lengths, strict=True)
        ]
        engine.run()
        alone = []
        for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            # a namespace of its own: nothing is found in the cache
            alone.append(engine.add(prompt, length, temperature=0.0, namespace=str(number)))
            engine.run()
    finally:
        worker.close()
    reference = load_reference(embedded_dir())
    for prompt, length, first, second in zip(prompts, lengths, together, alone, strict=True):
        assert len(engine.outputs[first]) == length
        assert_equal_or_tied(reference, prompt, engine.outputs[first], engine.outputs[second], TIE)
