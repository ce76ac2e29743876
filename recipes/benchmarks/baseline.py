"""Run a recipe with an optimizer that transformers has no `--optim` for: of pytorch_optimizer, of OWN, or Mechanic.

Its learning rate is that of the flags. Torch's Muon is for hidden matrices; the rest is AdamW's, whose rate is in
`--optim_args`:

    python recipes/benchmarks/baseline.py Lamb recipes/run_mlm.py --learning_rate 1e-2 --output_dir out
    python recipes/benchmarks/baseline.py Muon recipes/run_mlm.py --learning_rate 1e-2 --optim_args 1e-3
"""

import os
import runpy
import sys
from typing import Any

import pytorch_optimizer
import torch

from hf_alsals import AlsalsTrainer
from hf_alsals.direction import hidden_matrices
from hf_alsals.optimizer_direction import Float32OnCpu, set_hidden_matrices


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the hidden matrices of a model, AdamW for all other parameters.

    The weights of a convolution are a matrix with a row for each output. On a CPU all of it is in float32, as in
    `alsals_muon`.

    Args:
        model (`nn.Module`): The model.
        lr, rest_lr (`float`): The learning rates of Muon and of AdamW.
    """

    def __init__(self, model: torch.nn.Module, lr: float, rest_lr: float) -> None:
        groups = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        set_hidden_matrices(groups, model, layers_only=True)
        self.hidden = hidden_matrices(groups.param_groups)
        ids = {id(p) for p in self.hidden}
        rest = [p for group in groups.param_groups for p in group["params"] if id(p) not in ids]
        self.matrices = [torch.nn.Parameter(p.detach().view(len(p), -1)) for p in self.hidden]  # of the same memory
        self.parts = [
            torch.optim.Muon(self.matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=rest_lr, weight_decay=0.0),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Any = None) -> None:
        """Take a step of both."""
        for p, matrix in zip(self.hidden, self.matrices, strict=True):
            matrix.grad = None if p.grad is None else p.grad.flatten(1)
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups[0]["lr"] = group["lr"]  # which the schedule moves
            with Float32OnCpu():
                part.step()


class ChangedAdamW(torch.optim.AdamW):
    """AdamW without weight decay whose steps end elsewhere, as `end` says.

    Args:
        params (iterable): The parameters.
        lr (`float`): The learning rate.
    """

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr, weight_decay=0.0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Take a step."""
        starts = {p: p.clone() for group in self.param_groups for p in group["params"] if p.grad is not None}
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                if p in starts:
                    p.copy_(self.end(p, starts[p], group))

    def end(self, p: torch.Tensor, start: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Return where a parameter ends that AdamW has moved from its start."""
        raise NotImplementedError


class CautiousAdamW(ChangedAdamW):
    """AdamW without the moves that the gradient disagrees with, the others scaled up (arXiv 2411.16085)."""

    def end(self, p: torch.Tensor, start: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Return it, with the mask."""
        move = p - start
        agrees = (move * p.grad < 0).to(p.dtype)
        return start + move * agrees / agrees.mean().clamp(min=1e-3)


class NesterovAdamW(ChangedAdamW):
    """AdamW with Nesterov momentum: along the direction of `alsals` at a learning rate."""

    def end(self, p: torch.Tensor, start: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Return it, with Nesterov momentum."""
        beta1, beta2 = group["betas"]
        state = self.state[p]
        k = state["step"].item()
        momentum = state["exp_avg"].lerp(p.grad, 1 - beta1) / (1 - beta1 ** (k + 1))
        return start - group["lr"] * momentum / ((state["exp_avg_sq"] / (1 - beta2**k)).sqrt() + group["eps"])


OWN = {"Muon": MuonAndAdamW, "CautiousAdamW": CautiousAdamW, "NesterovAdamW": NesterovAdamW}


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """Return the optimizer of a name; Mechanic (arXiv 2306.00144) finds the learning rate of torch's AdamW."""
    if name == "Mechanic":
        from mechanic_pytorch import mechanize

        return mechanize(torch.optim.AdamW)
    return OWN.get(name) or getattr(pytorch_optimizer, name)


def main() -> None:
    if sys.argv[1:2] == ["Muon"] and "--optim_args" not in sys.argv:
        sys.exit("baseline.py Muon: --optim_args must be the learning rate of AdamW for what Muon leaves out.")
    if len(sys.argv) < 3 or not (sys.argv[1] in (*OWN, "Mechanic") or hasattr(pytorch_optimizer, sys.argv[1])):
        sys.exit(
            f"usage: baseline.py OPTIMIZER RECIPE [FLAGS], with {', '.join(OWN)}, Mechanic or an optimizer of "
            "pytorch_optimizer, as Lamb."
        )
    _, name, *sys.argv = sys.argv

    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        return optimizer_class(name), {"lr": args.learning_rate}

    def create_optimizer(trainer: Any, model: Any = None) -> torch.optim.Optimizer:
        args = trainer.args
        trainer.alsals, trainer.optimizer = (
            None,
            MuonAndAdamW(trainer.model, args.learning_rate, float(args.optim_args)),
        )
        return trainer.optimizer

    if name == "Muon":
        AlsalsTrainer.create_optimizer = create_optimizer
    else:
        AlsalsTrainer.get_optimizer_cls_and_kwargs = staticmethod(get_optimizer_cls_and_kwargs)
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))  # the recipes import what lies beside them
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
