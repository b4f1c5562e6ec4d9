import itertools
import math

import numpy as np
import pytest
import torch

from radix_backend.sampling import SamplingRows, row_keys, torch_native
from radix_backend.sampling.compiled import CompiledSampler
from radix_backend.sampling.noise import gumbel, hash32

VOCAB = 5000
COMPILED = CompiledSampler(torch.float32)
samplers = pytest.mark.parametrize("sample", [torch_native.sample, COMPILED], ids=["torch", "compiled"])

SHAPES = {
    "wide": lambda g: torch.randn(VOCAB, generator=g) * 3,
    "flat": lambda g: torch.randn(VOCAB, generator=g) * 0.01,
    "peaked": lambda g: torch.randn(VOCAB, generator=g) + 15 * (torch.rand(VOCAB, generator=g) > 0.999),
    "tied": lambda g: torch.randint(-3, 4, (VOCAB,), generator=g).float(),
    "huge": lambda g: torch.randn(VOCAB, generator=g) * 1000,
    "masked": lambda g: torch.randn(VOCAB, generator=g).masked_fill_(torch.rand(VOCAB, generator=g) > 0.01, -math.inf),
}
SETTINGS = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.01},
    {"temperature": 5.0},
    {"top_k": 1},
    {"top_k": 50, "temperature": 0.7},
    {"top_k": VOCAB},
    {"top_k": VOCAB + 1},
    {"top_k": VOCAB - 1},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 3000, "top_p": 0.95},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.02, "temperature": 1.5},
]


def rows(settings, seeds, positions=None):
    columns = [{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **setting} for setting in settings]
    return SamplingRows(
        temperature=np.array([column["temperature"] for column in columns], np.float32),
        top_k=np.array([column["top_k"] for column in columns], np.int32),
        top_p=np.array([column["top_p"] for column in columns], np.float32),
        min_p=np.array([column["min_p"] for column in columns], np.float32),
        keys=row_keys(
            np.asarray(seeds, np.int64), np.asarray(np.zeros(len(columns)) if positions is None else positions)
        ),
    )


def plain_draw(logits, setting, key):
    """Straight from the definition, with a full sort and a Python loop over it."""
    setting = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **setting}
    scaled = logits.numpy() / np.float32(setting["temperature"])
    likely = np.sort(scaled[scaled > -np.inf])[::-1]
    kept = likely[likely >= likely[0] + np.log(np.float32(setting["min_p"]))] if setting["min_p"] else likely
    if setting["top_k"]:
        kept = kept[kept >= kept[min(setting["top_k"], len(kept)) - 1]]
    masses = np.exp(kept.astype(np.float64) - kept[0])
    reached = np.searchsorted(np.cumsum(masses / masses.sum()), setting["top_p"]) if setting["top_p"] < 1 else len(kept)
    least = kept[min(reached, len(kept) - 1)]
    noise = gumbel(hash32(np.array([key]), np.arange(len(scaled))))[0]
    return int(np.where(scaled >= least, scaled + noise, -np.inf).argmax())


@samplers
@pytest.mark.parametrize("shape", SHAPES)
def test_draws_equal_the_definition(sample, shape):
    logits = torch.stack([SHAPES[shape](torch.Generator().manual_seed(seed)) for seed in range(len(SETTINGS) * 3)])
    chosen = rows(SETTINGS * 3, np.arange(len(logits)), np.arange(len(logits)) * 11)
    expected = [
        int(row.argmax()) if setting.get("temperature") == 0 else plain_draw(row, setting, key)
        for row, setting, key in zip(logits, SETTINGS * 3, chosen.keys, strict=True)
    ]
    assert sample(logits, chosen)[0].tolist() == expected


@samplers
@pytest.mark.parametrize(
    ("setting", "survivors"),
    [
        ({}, 12),
        ({"temperature": 2.0}, 12),
        ({"temperature": 0.5}, 12),
        ({"top_k": 4}, 4),
        ({"top_p": 0.7}, None),
        ({"min_p": 0.2}, None),
        ({"top_k": 6, "top_p": 0.8, "min_p": 0.05, "temperature": 1.3}, None),
    ],
)
def test_frequencies_follow_the_softmax(sample, setting, survivors):
    draws = 20_000
    logits = torch.linspace(-1.5, 2.0, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(1))]
    tokens, _ = sample(logits.repeat(draws, 1), rows([setting] * draws, np.full(draws, 99), np.arange(draws)))
    counts = np.bincount(tokens.numpy(), minlength=12)
    probabilities = (logits / setting.get("temperature", 1.0)).double().softmax(0).numpy()
    if "min_p" in setting:
        probabilities[probabilities < setting["min_p"] * probabilities.max()] = 0
    if "top_k" in setting:
        probabilities[probabilities < np.sort(probabilities)[-setting["top_k"]]] = 0
    if "top_p" in setting:
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities)
        cut = np.searchsorted(np.cumsum(probabilities[order]), setting["top_p"]) + 1
        probabilities[order[cut:]] = 0
    probabilities /= probabilities.sum()
    possible = probabilities > 0
    assert survivors is None or possible.sum() == survivors
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * draws
    chi_square = ((counts[possible] - expected) ** 2 / expected).sum()
    assert chi_square < 35  # at most 11 degrees of freedom: p > 0.0002


@samplers
def test_a_row_is_drawn_alike_in_any_batch(sample):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(len(SETTINGS), VOCAB, generator=generator) * 2
    seeds, positions = np.arange(len(SETTINGS)) * 7 + 2**40, np.arange(len(SETTINGS)) * 3
    together = sample(logits, rows(SETTINGS, seeds, positions))[0].tolist()
    alone = [
        int(sample(logits[i : i + 1], rows([SETTINGS[i]], seeds[i : i + 1], positions[i : i + 1]))[0])
        for i in range(len(SETTINGS))
    ]
    backwards = sample(logits.flip(0), rows(SETTINGS[::-1], seeds[::-1], positions[::-1]))[0].tolist()
    assert together == alone == backwards[::-1]


@samplers
def test_greedy_takes_the_first_of_equals(sample):
    logits = torch.zeros(2, VOCAB)
    logits[0, [700, 4000]] = 5
    assert sample(logits, rows([{"temperature": 0.0}] * 2, [1, 2]))[0].tolist() == [700, 0]


@samplers
def test_a_masked_token_is_never_drawn(sample):
    logits = torch.full((200, 8), -math.inf)
    logits[:, 5] = -40.0
    for setting in ({}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}, {"temperature": 0.0}):
        assert set(sample(logits, rows([setting] * 200, np.arange(200)))[0].tolist()) == {5}


@pytest.mark.parametrize("setting", SETTINGS)
def test_broken_logits_end_in_some_token(setting):
    for value in (math.nan, math.inf, -math.inf):
        (token,) = COMPILED(torch.full((1, VOCAB), value), rows([setting], [1]))[0].tolist()
        assert 0 <= token < VOCAB


def test_bf16_logits_draw_what_their_f32_values_draw():
    logits = (torch.randn(len(SETTINGS), VOCAB, generator=torch.Generator().manual_seed(5)) * 3).bfloat16()
    chosen = rows(SETTINGS, np.arange(len(SETTINGS)))
    assert torch.equal(CompiledSampler(torch.bfloat16)(logits, chosen)[0], COMPILED(logits.float(), chosen)[0])
    assert torch.equal(torch_native.sample(logits, chosen)[0], torch_native.sample(logits.float(), chosen)[0])


@samplers
def test_the_best_of_parts_of_the_vocabulary_is_the_token_of_the_whole(sample) -> None:
    generator = torch.Generator().manual_seed(8)
    logits = torch.stack([shape(generator) for shape in SHAPES.values()])
    settings = [{"temperature": 0.0}, {}, {"temperature": 5.0}, {}, {"temperature": 0.3}, {}]
    chosen = rows(settings, range(6))
    whole, highest = sample(logits, chosen)
    cuts = [0, 1700, 1701, 3400, VOCAB]
    parts = [sample(logits[:, start:end].contiguous(), chosen, start) for start, end in itertools.pairwise(cuts)]
    scores = torch.stack([part[1] for part in parts])
    winners = scores.argmax(dim=0, keepdim=True)
    assert torch.equal(torch.stack([part[0] for part in parts]).gather(0, winners)[0], whole)
    assert torch.equal(scores.max(dim=0).values, highest)
