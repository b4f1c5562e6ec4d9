import contextlib
import sys

import pytest
import torch
from tokenizers import Tokenizer

from radix_backend.config import EngineConfig
from radix_backend.errors import InvalidArgument
from radix_backend.process import Reporter
from radix_backend.worker import create_worker
from radix_backend.worker.interface import StepPlan
from tests.models.embedded import embedded_dir
from tests.models.tiny import KINDS, VOCAB, greedy, load_reference, save_tiny
from tests.worker.driver import Driver


@contextlib.contextmanager
def driver(directory, page_size=16, **settings):
    settings = {
        "device": "cpu",
        "dtype": "float32",
        "max_bs": 8,
        "context_len": 200,
        "kv_cache_memory": 2**22,
        **settings,
    }
    worker = create_worker(EngineConfig(page_size=page_size, **settings), directory, Reporter())
    try:
        yield Driver(worker, page_size)
    finally:
        worker.close()


def prompt(length, seed=0):
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module", params=["llama", "qwen3-biased"])
def model(request, tmp_path_factory):
    directory = save_tiny(tmp_path_factory.mktemp("tiny"), request.param)
    return directory, load_reference(directory)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_equal_transformers(tmp_path, kind):
    directory = save_tiny(tmp_path, kind, seed=3)
    with driver(directory) as d:
        row = d.new(0, prompt(37))
        d.step((row, 37))
        d.decode(row, count=20)
    assert row.outputs == greedy(load_reference(directory), prompt(37), 21)


@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
@pytest.mark.parametrize("chunks", [[50], [1, 49], [7, 13, 1, 29], [16, 16, 16, 2], [1] * 50])
def test_chunks_and_page_sizes_change_nothing(model, page_size, chunks):
    directory, reference = model
    with driver(directory, page_size) as d:
        row = d.new(3, prompt(50))
        for chunk in chunks:
            d.step((row, chunk))
        d.decode(row, count=10)
    assert row.outputs == greedy(reference, prompt(50), 11)


@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_pages_of_a_prefix_are_shared_between_slots(model, page_size):
    directory, reference = model
    common = prompt(40)
    shared = 40 // page_size
    with driver(directory, page_size) as d:
        first = d.new(0, common + prompt(9, seed=1))
        d.step((first, 49))
        second = d.new(5, common + prompt(30, seed=2), pages=first.pages[:shared])
        d.step((first, 1), (second, 70 - shared * page_size))
        d.decode(first, second, count=8)
    assert first.outputs == greedy(reference, common + prompt(9, seed=1), 10)
    assert second.outputs == greedy(reference, common + prompt(30, seed=2), 9)


@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_a_row_reads_pages_that_another_row_of_the_same_step_writes(model, page_size):
    directory, reference = model
    common = prompt(40)
    shared = 40 // page_size
    with driver(directory, page_size) as d:
        writer = d.new(0, common + prompt(9, seed=1))
        pages = list(range(shared))  # the driver gives the writer these
        long = d.new(1, common + prompt(30, seed=2), pages=pages)
        short = d.new(2, [*common[: shared * page_size], 7], pages=pages)
        # `short` has one token left, so it comes before the row that writes its prefix.
        d.step((writer, 49), (long, 70 - shared * page_size), (short, 1))
        assert writer.pages[:shared] == pages
        d.decode(writer, long, short, count=5)
    assert writer.outputs == greedy(reference, common + prompt(9, seed=1), 6)
    assert long.outputs == greedy(reference, common + prompt(30, seed=2), 6)
    assert short.outputs == greedy(reference, [*common[: shared * page_size], 7], 6)


def test_decodes_go_on_beside_prefill_chunks(model):
    directory, reference = model
    with driver(directory) as d:
        rows = [d.new(slot, prompt(10 + slot, seed=slot)) for slot in range(3)]
        d.step(*[(row, len(row.tokens)) for row in rows])
        late = d.new(7, prompt(60, seed=9))
        for chunk in (17, 20, 23):
            d.step(*[(row, 1) for row in rows], (late, chunk))
        d.decode(*rows, late, count=5)
    for slot, row in enumerate(rows):
        assert row.outputs == greedy(reference, prompt(10 + slot, seed=slot), 9)
    assert late.outputs == greedy(reference, prompt(60, seed=9), 6)


def test_a_slot_can_be_reused_while_its_last_step_is_in_flight(model):
    directory, reference = model
    with driver(directory) as d:
        old = d.new(0, prompt(20))
        d.step((old, 20))
        in_flight = d.launch((old, 1))
        new = d.new(0, prompt(15, seed=1))
        launched = d.launch((new, 15))
        d.settle(in_flight)
        d.settle(launched)
        d.decode(new, count=4)
    assert old.outputs == greedy(reference, prompt(20), 2)
    assert new.outputs == greedy(reference, prompt(15, seed=1), 5)


def test_page_remaps_take_effect(model):
    directory, reference = model
    with driver(directory) as d:
        first, second = d.new(0, prompt(40)), d.new(1, prompt(40))
        d.step((first, 40), (second, 40))
        third = d.new(2, prompt(33, seed=4))
        d.step((third, 33))
        d.remap(second, first.pages[:2])  # the same content, as when an insert finds its pages there
        d.step((first, 1), (second, 1))
        d.remap(second, third.pages[:2])  # other content: this must show
        d.step((first, 1), (second, 1))
    assert first.outputs == greedy(reference, prompt(40), 3)
    assert second.outputs[:2] == first.outputs[:2]
    assert second.outputs != first.outputs


SAMPLINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.8, "seed": 6, "top_k": 5},
    {"temperature": 1.3, "seed": 2**63 - 1, "top_p": 0.8},
    {"temperature": 1.0, "seed": 8, "min_p": 0.05, "top_k": 50, "top_p": 0.9},
]


def test_seeded_tokens_do_not_depend_on_batch_slot_chunks_or_retraction(model):
    directory, _ = model
    alone = []
    with driver(directory) as d:
        for sampling in SAMPLINGS:
            row = d.new(0, prompt(30), **sampling)
            d.step((row, 30))
            d.decode(row, count=15)
            alone.append(row.outputs)
    assert len({tuple(outputs) for outputs in alone}) == len(SAMPLINGS)
    with driver(directory, page_size=5) as d:
        rows = [d.new(7 - i, prompt(30), **sampling) for i, sampling in enumerate(SAMPLINGS)]
        for chunk in (11, 8, 11):
            d.step(*[(row, chunk) for row in rows])
        d.decode(*rows, count=6)
        # Come back as after a retraction: another slot, outputs prefilled, the first pages still there.
        back = [
            d.new(i, row.tokens, pages=row.pages[:4], prompt_len=30, **sampling)
            for i, (row, sampling) in enumerate(zip(rows, SAMPLINGS, strict=True))
        ]
        d.step(*[(row, len(row.tokens) - 20) for row in back])
        d.decode(*back, count=8)
    assert [first.outputs + second.outputs for first, second in zip(rows, back, strict=True)] == alone


def test_stop_tokens_are_not_sampled_before_min_tokens(model):
    directory, reference = model
    plain = greedy(reference, prompt(20), 6)
    with driver(directory) as d:
        row = d.new(0, prompt(20), min_tokens=4, stop_token_ids=tuple(plain))
        d.step((row, 20))
        d.decode(row, count=4)
        # The same request coming back with two outputs: they count.
        back = d.new(1, row.tokens[:22], prompt_len=20, min_tokens=4, stop_token_ids=tuple(plain))
        d.step((back, 22))
        d.decode(back, count=2)
    assert not set(row.outputs[:4]) & set(plain)
    assert back.outputs == row.outputs[2:5]
    with driver(directory) as d:
        row = d.new(0, prompt(20), min_tokens=0, stop_token_ids=tuple(plain))
        d.step((row, 20))
        d.decode(row, count=5)
    assert row.outputs == plain


def test_the_context_can_be_filled_to_its_last_token(model):
    directory, reference = model
    with driver(directory, context_len=24) as d:
        row = d.new(0, prompt(24))
        d.step((row, 24))
    assert row.outputs == greedy(reference, prompt(24), 1)


def test_a_failed_step_is_reported_by_settle_and_by_every_later_call(model):
    directory, _ = model
    with driver(directory) as d:
        row = d.new(0, [VOCAB + 1000])
        d.launch((row, 1))
        with pytest.raises(IndexError):
            d.worker.settle()
        with pytest.raises(IndexError):
            d.worker.settle()
        with pytest.raises(IndexError):
            d.worker.launch(StepPlan(5))


def test_a_checkpoint_that_does_not_fit_fails_the_construction(tmp_path):
    directory = save_tiny(tmp_path)
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 96', '"intermediate_size": 95'))
    with pytest.raises(InvalidArgument, match="gate_proj"), driver(directory):
        pass


def test_memory_settings_size_the_pool(model):
    directory, _ = model
    page = 2 * 2 * 16 * 4  # K and V, layers, tokens, bytes: times the width of the KV heads below
    width = {"LlamaForCausalLM": 2 * 16, "Qwen3ForCausalLM": 2 * 32}
    config = (directory / "config.json").read_text()
    size = page * next(width[name] for name in width if name in config)
    with driver(directory, kv_cache_memory=10 * size + 1) as d:
        assert d.worker.num_pages == 10
    with (
        pytest.raises(InvalidArgument, match=f"kv_cache_memory.*at least {size}"),
        driver(directory, kv_cache_memory=1),
    ):
        pass
    with driver(directory, kv_cache_memory=None) as d:  # plenty of memory: what 8 requests of 200 tokens can use
        assert d.worker.num_pages == 8 * 13


def test_without_numba_the_same_tokens_come_from_plain_torch(model, monkeypatch, caplog):
    directory, reference = model
    for module in ("attention.decode_kernel", "layers.compiled_ops", "sampling.compiled"):
        monkeypatch.setitem(sys.modules, f"radix_backend.{module}", None)  # importing it raises ImportError
    with driver(directory) as d:
        rows = [d.new(slot, prompt(30 + slot), **sampling) for slot, sampling in enumerate(SAMPLINGS)]
        d.step(*[(row, len(row.tokens)) for row in rows])
        d.decode(*rows, count=5)
    plain = [row.outputs for row in rows]
    assert plain[0] == greedy(reference, prompt(30), 6)
    assert len([record for record in caplog.records if "plain torch instead" in record.message]) == 3
    monkeypatch.undo()
    with driver(directory) as d:
        rows = [d.new(slot, prompt(30 + slot), **sampling) for slot, sampling in enumerate(SAMPLINGS)]
        d.step(*[(row, len(row.tokens)) for row in rows])
        d.decode(*rows, count=5)
    assert [row.outputs for row in rows] == plain


@pytest.mark.model
def test_the_embedded_model_knows_the_capital_of_france():
    tokenizer = Tokenizer.from_file(str(embedded_dir() / "tokenizer.json"))
    chat = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    with driver(embedded_dir(), dtype="bfloat16", kv_cache_memory=2**25) as d:
        row = d.new(0, tokenizer.encode(chat).ids)
        d.step((row, len(row.tokens)))
        d.decode(row, count=8)
    assert "Paris" in tokenizer.decode(row.outputs)
