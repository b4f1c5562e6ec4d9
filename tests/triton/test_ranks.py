"""Two tensor parallel ranks behind a real server."""

from __future__ import annotations

import pytest

from tests.triton.requests import GREEDY, stream, text_of
from tests.triton.server import eventually
from tests.triton.tiny_server import Start, start_tiny, tiny_model  # noqa: F401


@pytest.mark.server
@pytest.mark.parametrize("layout", [{"tp_size": 2}, {"pp_size": 2}], ids=["tp", "pp"])
def test_an_answer_is_streamed_by_two_ranks(start_tiny: Start, layout: dict[str, int]) -> None:  # noqa: F811
    server = start_tiny(device="cpu", **layout)
    server.wait_serving()
    parameters = GREEDY | {"max_tokens": 50, "ignore_eos": True}
    whole = server.generate(text_input="The sea", exclude_input_in_output=True, **parameters)["text_output"]

    def streamed() -> bool:
        """A token after the other: on a busy machine not at every attempt."""
        responses = list(stream(server.grpc, text_input="The sea", parameters=parameters))
        assert text_of(responses) == whole
        return len(responses) > 2

    eventually(streamed)
