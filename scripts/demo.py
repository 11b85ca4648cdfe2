"""`hf-xgrad demo` as a file, for `accelerate launch scripts/demo.py` and the like."""

import sys

from hf_xgrad.recipes.demo import main

if __name__ == "__main__":
    sys.exit(main(prog="demo.py"))
