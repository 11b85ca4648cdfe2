"""Closed forms, one file per library, registered when this is imported.

A form is one of two kinds, as its docstring says:

    exact      `- lr * delta` is the last realised update, weight decay apart: the state alone determines it.
    at rest    The coming step weighs the coming gradient on its own, which is no part of the state; delta is the step
               that follows if that gradient is its running mean.

Classes of libraries are named by strings: none of these libraries need be installed, and none is imported here.
"""

from hf_xgrad.closed_forms import (  # noqa: F401
    adam3,
    bitsandbytes,
    deepspeed,
    galore_torch,
    lion_pytorch,
    optimi,
    pytorch_optimizer,
    torch_optim,
)

# From here, so that a rule of the user's own is registered after ours.
from hf_xgrad.core.rules import register_rule as register_rule
