"""What the documentation lists is what the code knows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from radix_backend.config import EngineConfig
from radix_backend.metrics.families import ENGINE, REQUEST
from radix_backend.sampling_params import SamplingParams
from radix_backend.triton.reference import TABLES, fill, tables_in
from radix_backend.triton.tensors import INPUTS, OUTPUTS

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_the_tables_of_a_page_are_up_to_date(page: Path) -> None:
    text = page.read_text()
    assert text == fill(text), f"docs/{page.name} is stale: python -m radix_backend.triton.reference docs"


def test_every_table_stands_on_one_page() -> None:
    assert sorted(name for page in DOCS.glob("*.md") for name in tables_in(page.read_text())) == sorted(TABLES)


def test_the_request_reference_lists_every_tensor_and_parameter() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", (DOCS / "requests.md").read_text(), re.MULTILINE)
    names = [*(tensor.name for tensor in (*INPUTS, *OUTPUTS)), *SamplingParams.__struct_fields__]
    assert [name for name in names if name not in listed] == []


def test_metrics_that_pages_name_exist() -> None:
    known = {family.name for family in ENGINE + REQUEST}
    for page in DOCS.glob("*.md"):
        named = {name for name in re.findall(r"`(radix:\w+)`", page.read_text())}
        assert named <= known, page.name


def test_what_comes_from_vllm_backend_leads_to_settings_and_metrics() -> None:
    page = (DOCS / "coming-from-vllm-backend.md").read_text()
    keys = page[page.index("| key of") : page.index("[Settings]")]
    settings = re.findall(r"^\| `[^|]*\| `(\w+)", keys, re.MULTILINE)
    assert len(settings) > 9
    assert set(settings) <= set(EngineConfig.__struct_fields__)
    removed = re.findall(r"`(\w+)`", "".join(line for line in keys.splitlines() if "remove |" in line))
    assert removed
    assert set(removed).isdisjoint(EngineConfig.__struct_fields__)
    refused = re.findall(r"`(\w+)`", page[page.index("refused as unknown") : page.index("New are")])
    assert refused
    assert set(refused).isdisjoint(SamplingParams.__struct_fields__)


def test_a_stale_table_is_renewed_and_prose_is_kept() -> None:
    page = "before\n<!-- table: outputs -->\n| old |\n<!-- end -->\nafter\n"
    assert fill(page) == f"before\n<!-- table: outputs -->\n{TABLES['outputs']()}<!-- end -->\nafter\n"
    assert fill(fill(page)) == fill(page)


def test_an_unknown_table_is_an_error() -> None:
    with pytest.raises(KeyError, match="nothing"):
        fill("<!-- table: nothing -->\n<!-- end -->\n")


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", page.read_text())
    assert [link for link in links if not (DOCS / link).exists()] == []
