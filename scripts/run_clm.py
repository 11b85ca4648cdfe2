"""`hf-xgrad clm` as a file, for `accelerate launch scripts/run_clm.py` and the like."""

import sys

from hf_xgrad.recipes.language.clm import main

if __name__ == "__main__":
    sys.exit(main(prog="run_clm.py"))
