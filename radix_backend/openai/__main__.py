"""``python -m radix_backend.openai``: replaced by ``radix-backend openai``, a floor above."""

import os
import sys

os.execv(sys.executable, [sys.executable, "-m", "radix_backend.cli", "openai", *sys.argv[1:]])
