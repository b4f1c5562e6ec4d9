"""The CUDA worker with each attention that it can be given."""

import importlib.util

import numpy as np
import pytest
import torch

from tests.cuda import DEVICE, on_gpu  # isort: skip
from tests.engine.sim import SimEngine
from tests.models.ties import assert_equal_or_tied
from tests.models.tiny import VOCAB, greedy, load_reference, save_tiny
from tests.worker.cuda_worker import MODES, driver, prompt, worker

pytestmark = on_gpu

FLASHINFER = ["flashinfer-fa2", "flashinfer-fa3", "auto"]
needs_flashinfer = pytest.mark.skipif(
    DEVICE != "cuda" or importlib.util.find_spec("flashinfer") is None, reason="needs a GPU and flashinfer"
)
# Of one log probability, against f32. bf16 keeps 8 bits: of these logits, up to 16, it rounds 1/32 away, and every
# product before them adds to it. Seen on a CPU: 0.08.
TOLERANCE = 0.2
TIE = 2 * TOLERANCE


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
def test_greedy_tokens_of_the_reference_equal_transformers(tmp_path, kind, mode):
    directory = save_tiny(tmp_path, kind, seed=3)
    common = prompt(32, seed=9)
    with driver(directory, mode, attention_backend="torch_native") as d:
        first, second = d.new(0, common + prompt(37)), d.new(5, common + prompt(25, seed=2), pages=[0, 1])
        d.step((first, 69), (second, 25))
        d.decode(first, second, count=5)
        d.decode(second, count=3)
    reference = load_reference(directory)
    assert first.outputs == greedy(reference, common + prompt(37), 6)
    assert second.outputs == greedy(reference, common + prompt(25, seed=2), 9)


@pytest.fixture(scope="module", params=[2, 7], ids=["group2", "group7"])
def model(tmp_path_factory, request):
    """Queries that share a KV head: two, computed by CUDA cores, or seven, by tensor cores."""
    heads = {"num_attention_heads": 2 * request.param, "num_key_value_heads": 2, "head_dim": 64}
    directory = save_tiny(tmp_path_factory.mktemp("tiny"), "qwen3-biased", **heads)
    return directory, load_reference(directory)


@needs_flashinfer
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", [*FLASHINFER, "triton", "torch_native"])
def test_log_probabilities_in_bf16_are_near_those_of_f32(model, backend, mode):
    directory, reference = model
    settings = {"dtype": "bfloat16", "attention_backend": backend}
    forced = {"temperature": 0.0, "logprobs": 0}  # whatever is likely, this token follows: all see the same context
    with driver(directory, mode, **settings) as d:
        rows = [d.new(i, prompt(5 + 31 * i, seed=i), logit_bias={100 + i: 1000.0}, **forced) for i in range(5)]
        d.step(*[(row, 3) for row in rows])
        d.step(*[(row, len(row.tokens) - 3) for row in rows])
        d.decode(*rows, count=20)
    assert all(row.outputs == [100 + row.slot] * 21 for row in rows)
    differences = []
    for row in rows:
        with torch.inference_mode():
            expected = reference(torch.tensor([row.tokens])).logits[0].log_softmax(-1)
        at = row.prompt_len - 1
        for position, each in enumerate(row.logprobs):
            own = np.frombuffer(each.logprobs, "<f4")[0]
            differences.append(abs(float(expected[at + position, row.tokens[at + position + 1]]) - own))
    assert len(differences) == 5 * 21
    assert max(differences) < TOLERANCE


@needs_flashinfer
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", FLASHINFER)
def test_in_bf16_a_first_difference_between_streams_is_a_tie(model, backend, mode):
    """Together, alone, and with the Triton-language kernels: from one scheduler, with shared prefixes."""
    directory, reference = model
    common = prompt(33, seed=50)
    prompts = [common + prompt(5 + 7 * i % 40, seed=i) if i % 2 else prompt(1 + 11 * i % 90, seed=i) for i in range(16)]

    def streams(name, together):
        settings = {"dtype": "bfloat16", "attention_backend": name}
        with worker(directory, mode, page_size=16, **settings) as runner:
            engine = SimEngine(64, 16, max_bs=8, budget=48, worker=runner)
            ids = []
            for number, each in enumerate(prompts):
                namespace = "" if together else str(number)
                ids.append(engine.add(each, max_tokens=8, temperature=0.0, namespace=namespace))
                if not together:
                    engine.run(2)
            engine.run(2)
        return [engine.outputs[each] for each in ids]

    ours = streams(backend, together=True)
    for others in (streams(backend, together=False), streams("triton", together=True)):
        for each, first, second in zip(prompts, ours, others, strict=True):
            assert len(first) == 8
            assert_equal_or_tied(reference, each, first, second, TIE)
    assert {token for stream in ours for token in stream} <= set(range(VOCAB))
