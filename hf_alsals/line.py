"""The line that a search moves on: the loss along the direction."""

from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor
from torch.profiler import record_function

from .closure import loss_of
from .direction import Direction
from .shards import to_floats

SLOPES = ("exact", "preconditioned", "finite_difference")


class Line:
    """The loss of one batch at `w - step_size * d`, as numbers.

    As a context manager it puts the parameters back, to the bit, if anything raises.

    Args:
        direction (`Direction`): The direction, which is updated once a slope or probe is asked for. The first probe
            saves where its parameters are, unless they were saved before; their gradients are gone then.
        closure (`Callable[[], Tensor]`): Returns the loss of the batch that the gradients came from, a scalar.
        loss (`float`): The loss at step size 0.
        clip_coef (`float`, defaults to 1.0): What clipping multiplied the gradients by; the slope is divided by it.
        slope (`str`, defaults to `"exact"`): How the slope is measured: `"exact"` is `<g, d>`, `"preconditioned"`
            leaves momentum out of `d` (arXiv 2407.20650), and `"finite_difference"` probes the loss at the step size
            `sqrt(machine epsilon)` of the coarsest dtype among the parameters.

    Example:
        >>> import torch
        >>> from hf_alsals.adam import AdamDirection
        >>> w = torch.tensor([3.0], requires_grad=True)
        >>> (w**2).sum().backward()
        >>> groups = [{"params": [w], "lr": 1.0, "betas": (0.9, 0.999), "eps": 0.0, "weight_decay": 0.0}]
        >>> direction = AdamDirection(groups, {w: {}})
        >>> with torch.no_grad(), Line(direction, lambda: (w**2).sum(), loss=9.0) as line:
        ...     round(line.slope, 3), line.probe(1.0), line.move(0.5)  # the first step of Adam is along the sign
        (6.0, 4.0, None)
        >>> w.item()
        2.5
    """

    def __init__(
        self,
        direction: Direction,
        closure: Callable[[], Tensor | float],
        loss: float,
        clip_coef: float = 1.0,
        slope: str = "exact",
    ) -> None:
        self.direction = direction
        self.closure = closure
        self.loss = loss
        self._clip_coef = clip_coef
        self._slope_method = slope
        self._slopes: list[Tensor] = []
        self._measured_slope: float | None = None

    @property
    def slope(self) -> float:
        """The decrease of the loss per unit of step size at step size 0."""
        if self._measured_slope is None:
            self._measured_slope = self._measure_slope()
        return self._measured_slope

    def probe(self, step_size: float) -> float:
        """Move the parameters to a step size and return the loss there.

        Args:
            step_size (`float`): The step size.

        Raises:
            TypeError: If the closure does not return a tensor or a number.
            ValueError: If it returns a tensor of more than one element.
        """
        if self._slope_method == "finite_difference":
            _ = self.slope
        if not self.direction.is_updated:
            self._slopes = self.direction.first_move(step_size, momentum=self._slope_method == "exact")
        else:
            if not self.direction.is_saved:
                _ = self.slope  # it needs the gradients, whose memory save takes
                self.direction.save()
            self.direction.move(step_size)
        return self._loss_there()

    def _loss_there(self) -> float:
        torch.clear_autocast_cache()  # within an outer autocast it holds the weights of the training forward pass
        with record_function("ALSALS.probe"):
            return loss_of(self.closure)

    def move(self, step_size: float) -> None:
        """Take the optimizer step: `step_size` times each group's `lr`, with its weight decay.

        Args:
            step_size (`float`): The step size.
        """
        self.direction.step(step_size)

    def _measure_slope(self) -> float:
        if not self.direction.is_updated:
            self.direction.update()
        if self._slope_method == "finite_difference":
            if not self.direction.is_saved:
                self.direction.save()
            step_size = max(torch.finfo(p.dtype).eps for p in self.direction.params) ** 0.5
            self.direction.move(step_size)
            return (self.loss - self._loss_there()) / step_size
        slopes = self._slopes or self.direction.slope(momentum=self._slope_method == "exact")
        return sum(to_floats(slopes)) / self._clip_coef

    def __enter__(self) -> "Line":
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error_type is not None:
            self.direction.restore()
