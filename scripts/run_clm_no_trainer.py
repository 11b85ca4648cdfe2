"""`hf-xgrad clm-loop` as a file, for `accelerate launch scripts/run_clm_no_trainer.py` and the like."""

import sys

from hf_xgrad.recipes.loop.clm import main

if __name__ == "__main__":
    sys.exit(main(prog="run_clm_no_trainer.py"))
