import sys

from radix_backend.cli import main

sys.exit(main())
