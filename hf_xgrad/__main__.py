"""`python -m hf_xgrad` is the command `hf-xgrad`."""

import sys

from hf_xgrad.cli import main

if __name__ == "__main__":
    sys.exit(main())
