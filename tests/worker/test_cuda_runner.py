"""The CUDA worker: on a GPU with and without graphs, elsewhere in Triton's interpreter."""

import pytest
import torch

from tests.cuda import DEVICE, on_gpu  # isort: skip
from radix_backend.config import EngineConfig
from radix_backend.process import Reporter
from tests.engine.sim import SimEngine
from tests.models.tiny import KINDS, VOCAB, greedy, load_reference, save_tiny
from tests.worker.cuda_worker import MODES, driver, prompt, worker
from tests.worker.driver import Driver

pytestmark = on_gpu


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = save_tiny(tmp_path_factory.mktemp("tiny"), "qwen3-biased")
    return directory, load_reference(directory)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_equal_transformers(tmp_path, kind, mode):
    directory = save_tiny(tmp_path, kind, seed=3)
    with driver(directory, mode) as d:
        first, second = d.new(0, prompt(37)), d.new(5, prompt(25, seed=2))
        d.step((first, 20))
        d.step((first, 17), (second, 25))
        d.decode(first, second, count=5)
        d.decode(second, count=3)
    reference = load_reference(directory)
    assert first.outputs == greedy(reference, prompt(37), 6)
    assert second.outputs == greedy(reference, prompt(25, seed=2), 9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("page_size", [1, 16])
def test_a_row_reads_pages_that_another_row_of_the_same_step_writes(model, page_size, mode):
    directory, reference = model
    common = prompt(40)
    shared = 40 // page_size
    with driver(directory, mode, page_size) as d:
        running = d.new(3, prompt(21, seed=4))
        d.step((running, 21))
        writer = d.new(0, common + prompt(9, seed=1))
        first = running.pages[-1] + 1
        pages = list(range(first, first + shared))  # the driver gives the writer these
        long = d.new(1, common + prompt(30, seed=2), pages=pages)
        short = d.new(2, [*common[: shared * page_size], 7], pages=pages)
        # `short` has one token left, so it comes before the row that writes its prefix.
        d.step((writer, 49), (long, 70 - shared * page_size), (short, 1), (running, 1))
        d.decode(writer, long, short, running, count=3)
    assert writer.pages[:shared] == pages
    assert writer.outputs == greedy(reference, common + prompt(9, seed=1), 4)
    assert long.outputs == greedy(reference, common + prompt(30, seed=2), 4)
    assert short.outputs == greedy(reference, [*common[: shared * page_size], 7], 4)
    assert running.outputs == greedy(reference, prompt(21, seed=4), 5)


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_share_a_prefix_generate_as_if_alone(model, mode):
    directory, reference = model
    common = [prompt(80), prompt(70, seed=9)]
    own = [prompt(3 + 5 * i, seed=20 + i) for i in range(9)]
    with driver(directory, mode, page_size=8, max_bs=16) as d:
        first = [d.new(group, common[group] + own[group]) for group in range(2)]
        d.step(*[(row, len(row.tokens)) for row in first])
        shared = [row.pages[:8] for row in first]
        rest = [d.new(12 - i, common[i % 2] + own[i], pages=shared[i % 2]) for i in range(2, 9)]
        d.step(*[(row, 1) for row in first], *[(row, len(row.tokens) - 64) for row in rest])
        rows = [first[0], *rest, first[1]]
        d.decode(*rows, count=3)
        d.decode(*rows[1:], count=2)
        d.remap(first[1], first[1].pages[:1])
        d.decode(*reversed(rows[1:]), count=1)
        d.decode(*rows[:3], count=2)
    for i, row in enumerate([*first, *rest]):
        assert row.outputs == greedy(reference, common[i % 2] + own[i], len(row.outputs)), i
    assert [len(row.outputs) for row in rows] == [7, 9, 9, 7, 7, 7, 7, 7, 8]


@pytest.mark.parametrize("mode", MODES)
def test_a_slot_can_be_reused_while_its_last_step_is_in_flight(model, mode):
    directory, reference = model
    with driver(directory, mode) as d:
        old = d.new(0, prompt(20))
        d.step((old, 20))
        in_flight = d.launch((old, 1))
        new = d.new(0, prompt(15, seed=1))
        launched = d.launch((new, 15))
        d.settle(in_flight)
        d.settle(launched)
        d.decode(new, count=3)
    assert old.outputs == greedy(reference, prompt(20), 2)
    assert new.outputs == greedy(reference, prompt(15, seed=1), 4)


SAMPLINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.8, "seed": 6, "top_k": 5},
    {"temperature": 1.3, "seed": 2**63 - 1, "top_p": 0.8},
    {"temperature": 1.0, "seed": 8, "min_p": 0.05, "top_k": 50, "top_p": 0.9},
    {"temperature": 0.0, "repetition_penalty": 1.5, "logit_bias": {3: 2.0}, "frequency_penalty": 0.5},
]
RULES = [
    {"repetition_penalty": 1.5},
    {"presence_penalty": 1.2, "frequency_penalty": -0.3},
    {"frequency_penalty": 0.7},
    {"logit_bias": {3: 6.0, 4: 5.5, 5: -100.0}},
    {"min_tokens": 4, "stop_token_ids": tuple(range(0, VOCAB, 2))},
    {"bad_words": tuple((token,) for token in range(0, VOCAB, 3)) + tuple((1, token) for token in range(VOCAB))},
    {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "logit_bias": {1: 4.0, 2: 3.0},
        "min_tokens": 3,
        "stop_token_ids": (1, 7),
        "bad_words": ((2, 1), (9,)),
        "top_k": 40,
        "logprobs": 1,
    },
]


def cpu_driver(directory):
    from radix_backend.worker.runner import Runner

    config = EngineConfig(dtype="float32", max_bs=8, context_len=200, kv_cache_memory=2**22)
    return Driver(Runner(config, directory, Reporter()), 16)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("samplings", [SAMPLINGS, RULES, [{**rule, "temperature": 1.0, "seed": 9} for rule in RULES]])
def test_tokens_equal_those_of_the_cpu_whatever_the_batch(model, mode, samplings):
    directory, _ = model
    cpu = cpu_driver(directory)
    expected = []
    for sampling in samplings:
        row = cpu.new(0, prompt(30), **sampling)
        cpu.step((row, 30))
        cpu.decode(row, count=8)
        expected.append(row.outputs)
    cpu.worker.close()
    with driver(directory, mode, page_size=5) as d:
        rows = [d.new(7 - i, prompt(30), **sampling) for i, sampling in enumerate(samplings)]
        for chunk in (11, 8, 11):
            d.step(*[(row, chunk) for row in rows])
        plain = d.new(0, prompt(12))  # others do not mind their neighbours
        d.step(*[(row, 1) for row in rows], (plain, 12))
        d.decode(*rows[:5], count=7)
        d.decode(*rows[5:], plain, count=4)
        # A request that comes back after a retraction: prompt and outputs are computed anew, outputs stay outputs.
        resumed = [
            d.new(row.slot, row.tokens, prompt_len=30, **sampling)
            for row, sampling in zip(rows[5:], samplings[5:], strict=True)
        ]
        d.step(*[(row, 20) for row in resumed], (plain, 1))
        d.step(*[(row, 16) for row in resumed], (plain, 1))
        d.decode(*resumed, plain, count=2)
    for row, again in zip(rows[5:], resumed, strict=True):
        row.outputs += again.outputs
    assert [row.outputs for row in rows] == expected
    assert plain.outputs == greedy(model[1], prompt(12), 9)


@pytest.mark.parametrize("mode", MODES)
def test_logprobs_equal_those_of_the_cpu(model, mode):
    directory, _ = model

    def run(d):
        rows = [
            d.new(0, prompt(30), logprobs=3, prompt_logprobs=2),
            d.new(1, prompt(9)),
            d.new(2, prompt(12), logprobs=0),
        ]
        d.step((rows[0], 13), (rows[1], 9))
        d.step((rows[0], 17), (rows[1], 1), (rows[2], 12))
        d.decode(*rows, count=2)
        return [row.logprobs for row in rows], d.prompt_logprobs

    cpu = cpu_driver(directory)
    expected = run(cpu)
    cpu.worker.close()
    with driver(directory, mode) as d:
        actual = run(d)
    flat = [[each for part in (*own, *prompts) for each in part] for own, prompts in (actual, expected)]
    assert len(flat[0]) == len(flat[1]) > 30
    for ours, theirs in zip(*flat, strict=True):
        assert (ours.rank, ours.token_ids) == (theirs.rank, theirs.token_ids)
        values = [torch.frombuffer(bytearray(each.logprobs), dtype=torch.float32) for each in (ours, theirs)]
        torch.testing.assert_close(*values, rtol=0, atol=1e-4)


@pytest.mark.skipif(DEVICE == "cpu", reason="takes a GPU")
@pytest.mark.parametrize("mode", MODES)
def test_no_step_waits_for_the_device(model, mode):
    """Not even those with rules and log probabilities, of prompts too."""
    with driver(model[0], mode) as d:
        rows = [d.new(i, prompt(30), logprobs=3, **sampling) for i, sampling in enumerate(SAMPLINGS)]
        rows.append(d.new(7, prompt(30), prompt_logprobs=2, **{**RULES[-1], "seed": 1}))
        torch.cuda.set_sync_debug_mode("error")
        try:
            d.step(*[(row, 20) for row in rows])
            d.step(*[(row, 10) for row in rows])
            d.decode(*rows, count=3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert [len(row.outputs) for row in rows] == [4] * len(rows)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("depth", [1, 2])
def test_streams_under_a_scheduler_equal_transformers(model, mode, depth):
    directory, reference = model
    count = 24 if DEVICE == "cuda" else 4
    common = prompt(33, seed=50)
    prompts = [
        common + prompt(5 + 7 * i % 40, seed=i) if i % 2 else prompt(1 + 11 * i % 90, seed=i) for i in range(count)
    ]
    with worker(directory, mode, page_size=4) as runner:
        engine = SimEngine(40 if DEVICE == "cuda" else 60, 4, max_bs=8, budget=48, worker=runner)
        ids = [engine.add(each, max_tokens=6, temperature=0.0) for each in prompts]
        engine.run(depth)
    for request_id, each in zip(ids, prompts, strict=True):
        assert engine.outputs[request_id] == greedy(reference, each, 6)
