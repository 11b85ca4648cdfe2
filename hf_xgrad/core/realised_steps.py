"""Which steps an optimizer really takes."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from torch.optim import Optimizer

OwnerT = TypeVar("OwnerT")


def watch_steps(
    optimizer: Optimizer,
    owner: OwnerT,
    before: Callable[[OwnerT], None],
    after: Callable[[OwnerT], None],
    ignored: Callable[[], bool],
) -> None:
    """Calls `before(owner)` and `after(owner)` around each realised step, as long as `owner` lives.

    Only the optimizer itself knows these: a GradScaler skips some, an accumulating loop calls `step` on a wrapper that
    does nothing, and neither leaves a trace in a gradient.

    Args:
        optimizer: the optimizer.
        owner: is not kept alive.
        before: right before the optimizer steps.
        after: right after it has stepped; not after a step that raised.
        ignored: whether steps do not count now.
    """
    reference = weakref.ref(owner)
    running: list[FrameType] = []  # the call of the step that is being realised, or that raised

    def pre(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        alive = reference()
        if alive is None or ignored():
            return
        if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
            raise RuntimeError(
                "WeightPredictor: optimizer.step(closure) would run forward and backward on the true weights; run "
                "them in predicted() and call optimizer.step() without a closure"
            )
        if running and _is_running(running[-1]):
            return  # within a step: a subclass that calls the step of its base runs the hooks of both
        before(alive)
        running[:] = [sys._getframe(1)]

    def post(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        alive = reference()
        if alive is not None and running and running[-1] is sys._getframe(1):
            running.clear()
            after(alive)

    handles = optimizer.register_step_pre_hook(pre), optimizer.register_step_post_hook(post)
    weakref.finalize(owner, _remove_all, handles)


def _is_running(frame: FrameType) -> bool:
    """Whether a call has not ended yet; Python refuses to clear the frame of one."""
    try:
        frame.clear()
    except RuntimeError:
        return True
    return False


def _remove_all(handles: tuple[Any, ...]) -> None:
    for handle in handles:
        handle.remove()
