"""The directions of other optimizers: what their step of learning rate 1 would subtract from the weights."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from .adam import AdamDirection, NesterovAdamDirection
from .direction import Chunk, Direction, state_dtype
from .shards import grad_of

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Of the optimizer's own state among ours, and the steps that those of pytorch_optimizer count in their groups.
_PREFIX = "optimizer_"
_STEPS = "steps_of_group"


class OptimizerDirection(Direction):
    """The step of an optimizer that is proportional to its learning rate, as a direction.

    For each parameter the optimizer takes a step of learning rate 1 without weight decay on a copy, and what that
    subtracts is kept: one tensor more than the optimizer's own state. Which optimizer, a subclass says.
    """

    buffer_names = ("direction",)
    has_momentum_apart = False
    takes_shards = False

    reads_weights: ClassVar[bool] = False  # else the copy is zeros, from which differences are exact

    def optimizer_of(self, p: Tensor, copy: Tensor, group: dict[str, Any]) -> torch.optim.Optimizer:
        """Return the optimizer of a parameter's copy, at learning rate 1 and without weight decay.

        Args:
            p (`Tensor`): The parameter.
            copy (`Tensor`): The copy, with its gradient.
            group (`dict`): The parameter group.
        """
        raise NotImplementedError

    def shape_of(self, p: Tensor, group: dict[str, Any]) -> tuple[int, ...]:
        """Return the shape that the optimizer sees a parameter in; by default its own."""
        return tuple(p.shape)

    def step_of(self, optimizer: torch.optim.Optimizer) -> None:
        """Have the optimizer take its step."""
        optimizer.step()

    def accumulate(self, chunk: Chunk) -> None:
        """Do nothing: the optimizer has taken in the gradients of whole parameters."""

    def tensors(self, chunk: Chunk, momentum: bool = True) -> list[Tensor]:
        """Return the pieces of the direction, momentum included."""
        return chunk.buffers["direction"]

    def _cut(self, group: dict[str, Any], params: list[Tensor]) -> list[Chunk]:
        for p in params:
            if isinstance(p, DTensor):
                raise ValueError(
                    f"{self.description} needs whole parameters, got a shard (FSDP2): use DDP, or direction=adam."
                )
        chunks = super()._cut(group, params)
        for p in params:
            self.state[p]["direction"].copy_(self._direction_of(p, group))
        return chunks

    def _direction_of(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        start = p.detach().to(state_dtype(p)) if self.reads_weights else torch.zeros_like(p, dtype=state_dtype(p))
        shape = self.shape_of(p, group)
        copy = start.reshape(shape).clone().requires_grad_()
        copy.grad = grad_of(p).to(copy.dtype).reshape(shape)
        optimizer = self.optimizer_of(p, copy, group)
        state = self.state[p]
        own = {name.removeprefix(_PREFIX): value for name, value in state.items() if name.startswith(_PREFIX)}
        if own:
            if isinstance(own.get("step"), Tensor):
                own["step"] = own["step"].cpu()  # wherever a checkpoint has been loaded to
            optimizer.state[copy] = own
        (its_group,) = optimizer.param_groups
        if _STEPS in state:
            its_group["step"] = state[_STEPS]
        self.step_of(optimizer)
        state.update({_PREFIX + name: value for name, value in optimizer.state[copy].items()})
        if "step" in its_group:
            state[_STEPS] = its_group["step"]
        return start - copy.detach().view_as(start)


class LionDirection(OptimizerDirection):
    """Lion's direction, the sign of its momentum (arXiv 2302.06675); the package pytorch_optimizer does the work."""

    name = "lion"
    description = "Lion's direction"
    takes_betas = False

    @classmethod
    def check_installed(cls) -> None:
        """Raise an ImportError if the package is missing."""
        _from_pytorch_optimizer("Lion", cls.name)

    def optimizer_of(self, p: Tensor, copy: Tensor, group: dict[str, Any]) -> torch.optim.Optimizer:
        """Return Lion with its own betas, (0.9, 0.99)."""
        return _from_pytorch_optimizer("Lion", self.name)([copy], lr=1.0, weight_decay=0.0)


class LambDirection(OptimizerDirection):
    """LAMB's direction, trust ratios included (arXiv 1904.00962); the package pytorch_optimizer does the work."""

    name = "lamb"
    description = "LAMB's direction"
    reads_weights = True

    @classmethod
    def check_installed(cls) -> None:
        """Raise an ImportError if the package is missing."""
        _from_pytorch_optimizer("Lamb", cls.name)

    def optimizer_of(self, p: Tensor, copy: Tensor, group: dict[str, Any]) -> torch.optim.Optimizer:
        """Return LAMB with the betas and eps of the group."""
        lamb = _from_pytorch_optimizer("Lamb", self.name)
        return lamb([copy], lr=1.0, betas=group["betas"], eps=group["eps"], weight_decay=0.0)


class AdafactorDirection(OptimizerDirection):
    """Adafactor's direction as the Trainer's `--optim adafactor` has it (arXiv 1804.04235), by transformers' class."""

    name = "adafactor"
    description = "Adafactor's direction"
    takes_betas = False

    @classmethod
    def check_installed(cls) -> None:
        """Raise an ImportError if the package is missing."""
        cls._adafactor()

    def optimizer_of(self, p: Tensor, copy: Tensor, group: dict[str, Any]) -> torch.optim.Optimizer:
        """Return Adafactor without a learning rate of its own."""
        return self._adafactor()([copy], lr=1.0, scale_parameter=False, relative_step=False)

    @staticmethod
    def _adafactor() -> Any:
        try:
            from transformers import Adafactor  # the optimizer alone does not need transformers
        except ImportError as error:
            raise ImportError("direction=adafactor needs the package transformers: pip install it.") from error
        return Adafactor


class Float32OnCpu(TorchFunctionMode):
    """Within it `torch.optim.Muon` of torch 2.9 to 2.13 orthogonalizes matrices on a CPU in float32, not bfloat16.

    A CPU without instructions for bfloat16 took 13 to 33 times as long for its products.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.bfloat16 and args[0].device.type == "cpu":
            return args[0].to(torch.float32, copy=True)  # a copy, as it is divided in place
        return func(*args, **(kwargs or {}))


class MuonDirection(OptimizerDirection):
    """Muon's direction for hidden matrices, Adam's for all other parameters.

    A matrix moves along its orthogonalized momentum (`torch.optim.Muon`, torch 2.9 or newer), scaled so that its root
    mean square is 0.2, as Adam's is (arXiv 2502.16982, `match_rms_adamw`), on a CPU in float32. The weights of a
    convolution are a matrix with a row for each output. Which matrices are hidden ones the tensors do not say: a
    parameter group with `"hidden": False` holds embeddings and the head. The Trainer notes them by itself.
    """

    name = "muon"
    description = "Muon's direction"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._hidden = {id(p) for p in self.hidden_matrices if p.numel() > 0}

    @classmethod
    def check_installed(cls) -> None:
        """Raise an ImportError if torch is older."""
        if not hasattr(torch.optim, "Muon"):
            raise ImportError(f"direction=muon needs torch 2.9 or newer, got {torch.__version__}.")

    def shape_of(self, p: Tensor, group: dict[str, Any]) -> tuple[int, ...]:
        """Return two dimensions for what moves along Muon's direction, else the parameter's own."""
        return (len(p), p.numel() // len(p)) if id(p) in self._hidden else tuple(p.shape)

    def _cut(self, group: dict[str, Any], params: list[Tensor]) -> list[Chunk]:
        for p in params:
            has_muons = f"{_PREFIX}momentum_buffer" in self.state[p]
            if "step" in self.state[p] and has_muons != (id(p) in self._hidden):
                raise ValueError(
                    f"hidden must be said before the first step: a parameter of shape {list(p.shape)} has moved along "
                    f"{'Muon' if has_muons else 'Adam'}'s direction, and is to move along the other now."
                )
        return super()._cut(group, params)

    def optimizer_of(self, p: Tensor, copy: Tensor, group: dict[str, Any]) -> torch.optim.Optimizer:
        """Return Muon for a hidden matrix, else AdamW with the betas and eps of the group."""
        if id(p) in self._hidden:
            return torch.optim.Muon([copy], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        return torch.optim.AdamW([copy], lr=1.0, betas=group["betas"], eps=group["eps"], weight_decay=0.0)

    def step_of(self, optimizer: torch.optim.Optimizer) -> None:
        """Have the optimizer take its step, Muon on a CPU in float32."""
        if not isinstance(optimizer, torch.optim.Muon):
            optimizer.step()
            return
        with Float32OnCpu(), torch.autocast("cpu", enabled=False):
            optimizer.step()


def set_hidden_matrices(optimizer: torch.optim.Optimizer, model: nn.Module, layers_only: bool = False) -> None:
    """Note in the parameter groups which matrices are no hidden ones: the places of embeddings and heads, `"apart"`.

    Heads are output embeddings, and linear layers outside of the blocks that have one output, or as many as the config
    has tokens or labels. Blocks are what module lists hold, unless they are single layers.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer of the model.
        model (`nn.Module`): The model.
        layers_only (`bool`, defaults to `False`): Whether hidden matrices are the weights of linear layers and
            convolutions only, as Muon takes them.
    """
    config, output = getattr(model, "config", None), getattr(model, "get_output_embeddings", lambda: None)()
    sizes = {1, *(getattr(config, name, None) for name in ("vocab_size", "num_labels"))} - {None}
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    in_blocks = {id(part) for blocks in lists for block in blocks if [*block.children()] for part in block.modules()}
    apart, layers = set(), set()
    for name, module in model.named_modules():
        is_layer = isinstance(module, _LAYERS) or type(module).__name__ == "Conv1D"  # transformers' own
        is_adapter = ".lora_" in name  # whose rank may be the number of labels
        is_of_size = getattr(module, "out_features", None) in sizes and not is_adapter
        is_head = module is output or (is_of_size and id(module) not in in_blocks)
        if isinstance(module, nn.Embedding) or (is_layer and is_head):
            apart.add(id(module.weight))
        elif is_layer:
            layers.add(id(module.weight))
    for group in optimizer.param_groups:
        group["apart"] = [
            place
            for place, p in enumerate(group["params"])
            if p.ndim > 1 and (id(p) in apart or (layers_only and id(p) not in layers))
        ]


def _from_pytorch_optimizer(name: str, direction: str) -> Any:
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise ImportError(f"direction={direction} needs the package pytorch_optimizer: pip install it.") from error
    return getattr(pytorch_optimizer, name)


DIRECTIONS: dict[str, type[Direction]] = {
    direction.name: direction
    for direction in (
        NesterovAdamDirection,
        AdamDirection,
        MuonDirection,
        LambDirection,
        AdafactorDirection,
        LionDirection,
    )
}


def direction_of(direction: str | type[Direction] | None, default: str) -> type[Direction]:
    """Return a direction by its name.

    Args:
        direction (`str` or `type[Direction]`, *optional*): A name in `DIRECTIONS`, or a class of your own.
        default (`str`): The name of the direction where none is given.

    Raises:
        TypeError: If it is neither.
        ValueError: If the name is unknown.
    """
    direction = default if direction is None else direction
    if isinstance(direction, str):
        if direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}.")
        return DIRECTIONS[direction]
    if not (isinstance(direction, type) and issubclass(direction, Direction) and hasattr(direction, "name")):
        raise TypeError(f"direction must be a name or a subclass of Direction with a name, got {direction!r}.")
    return direction
