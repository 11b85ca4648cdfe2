"""`hf-xgrad sweep` as a file, for `accelerate launch scripts/sweep.py` and the like."""

import sys

from hf_xgrad.recipes.sweep import main

if __name__ == "__main__":
    sys.exit(main(prog="sweep.py"))
