"""Whether kernels in Triton language work on the GPU that is there."""

from __future__ import annotations


def why_no_kernels() -> str | None:
    """What keeps them from being compiled and launched; None: they can be."""
    try:
        from radix_backend.layers.cuda_probe import probe

        probe()
    except ModuleNotFoundError as error:
        return f"the Python package {error.name!r} is missing; torch's CUDA builds bring it"
    except Exception as error:  # compilers, drivers and caches fail in many ways
        return (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
        )
    return None
