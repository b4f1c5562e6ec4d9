"""Two tensor parallel ranks behind a real server."""

from __future__ import annotations

import pytest

from tests.triton.requests import GREEDY, stream, text_of
from tests.triton.tiny_server import Start, start_tiny, tiny_model  # noqa: F401


@pytest.mark.server
@pytest.mark.parametrize("layout", [{"tp_size": 2}, {"pp_size": 2}], ids=["tp", "pp"])
def test_an_answer_is_streamed_by_two_ranks(start_tiny: Start, layout: dict[str, int]) -> None:  # noqa: F811
    server = start_tiny(device="cpu", **layout)
    server.wait_serving()
    parameters = GREEDY | {"max_tokens": 12, "ignore_eos": True}
    responses = list(stream(server.grpc, text_input="The sea", parameters=parameters))
    whole = server.generate(text_input="The sea", exclude_input_in_output=True, **parameters)["text_output"]
    assert text_of(responses) == whole
    assert len(responses) > 2
