"""Run a recipe with an optimizer of the package pytorch_optimizer, which transformers has no `--optim` for.

Its learning rate is that of the flags:

    python recipes/benchmarks/baseline.py Lamb recipes/run_mlm.py --learning_rate 1e-2 --output_dir out
"""

import os
import runpy
import sys
from typing import Any

import pytorch_optimizer

from hf_alsals import AlsalsTrainer


def main() -> None:
    if len(sys.argv) < 3 or not hasattr(pytorch_optimizer, sys.argv[1]):
        sys.exit("usage: baseline.py OPTIMIZER RECIPE [FLAGS], with an optimizer of pytorch_optimizer, such as Lamb.")
    _, name, *sys.argv = sys.argv

    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        return getattr(pytorch_optimizer, name), {"lr": args.learning_rate}

    AlsalsTrainer.get_optimizer_cls_and_kwargs = staticmethod(get_optimizer_cls_and_kwargs)
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))  # the recipes import what lies beside them
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
