"""`hf-xgrad mlm` as a file, for `accelerate launch scripts/run_mlm.py` and the like."""

import sys

from hf_xgrad.recipes.language.mlm import main

if __name__ == "__main__":
    sys.exit(main(prog="run_mlm.py"))
