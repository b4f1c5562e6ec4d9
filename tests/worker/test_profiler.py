from pathlib import Path

import pytest

from radix_backend.errors import InvalidArgument, Unavailable
from radix_backend.worker.profiler import TorchProfiler


def test_a_profile_that_cannot_be_written_is_an_error_and_the_next_one_can_be(tmp_path: Path) -> None:
    directory = tmp_path / "profiles"
    directory.write_text("a file where the directory should be")
    profiler = TorchProfiler(directory)
    profiler.start()
    with pytest.raises(Unavailable, match="could not be written to"):
        profiler.stop()
    assert not profiler.active
    with pytest.raises(InvalidArgument, match="no profile is being recorded"):
        profiler.stop()
    directory.unlink()
    profiler.start()
    assert Path(profiler.stop()).parent == directory
