"""What Triton loads. The model itself is the package `radix_backend`, in the Python environment of the server."""

import sys
from pathlib import Path

try:
    from radix_backend.triton.model import TritonPythonModel  # noqa: F401
except ModuleNotFoundError as error:
    checkout = Path(__file__).resolve().parents[3]
    package = f"-e {checkout}" if (checkout / "pyproject.toml").exists() else "radix-backend"
    raise ModuleNotFoundError(
        f"the Python of this server has no package {error.name!r}. Install it:\n"
        f"    {sys.executable} -m pip install {package}\n"
        "or start the server with script/server, or in the environment that `radix-backend env` prints."
    ) from None
