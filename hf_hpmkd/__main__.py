"""`python -m hf_hpmkd ...` and `accelerate launch -m hf_hpmkd ...`: the same as the command `hpmkd ...`."""

import sys

from hf_hpmkd.cli import main

if __name__ == "__main__":
    sys.exit(main())
