"""`hf-alsals run`: an unchanged script whose Trainer trains with an optimizer of this package."""

import argparse
import difflib
import gc
import importlib.util
import os
import runpy
import sys

import torch

from .presets import PRESETS


class ScriptError(ValueError):
    """What a script cannot be run for, in one sentence."""


def run_script(script: str, script_args: list[str], is_module: bool = False) -> None:
    """Run a script as `python SCRIPT ARGUMENTS` does, with the optimizer that `--optim` among its arguments names.

    Without `--optim`, or with one of the Trainer's own, it runs as it is.

    Args:
        script (`str`): The path of the script, or the name of a module.
        script_args (`list[str]`): Its command line. `--optim` and `--optim_args` are taken out of it.
        is_module (`bool`, defaults to `False`): Whether it is a module, as for `python -m`.

    Raises:
        ScriptError: If there is no such script or optimizer, or it has made no Trainer to train with the optimizer.
    """
    if not sys.flags.safe_path:  # what python puts there for the script
        sys.path[0] = os.getcwd() if is_module else os.path.dirname(os.path.abspath(script))
    if not (_is_module(script) if is_module else os.path.isfile(script)):
        kind = "a module that Python finds" if is_module else "a file with Python code, or a module after -m"
        raise ScriptError(f"SCRIPT must be {kind}, got {script!r}.")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--optim")
    parser.add_argument("--optim_args", "--optim-args")
    ours, rest = parser.parse_known_args(script_args)
    if ours.optim not in PRESETS:
        if close := difflib.get_close_matches(ours.optim or "", PRESETS, n=1, cutoff=0.75):
            raise ScriptError(
                f"--optim must be one of {', '.join(PRESETS)} or of the Trainer's own, got {ours.optim!r}; {close[0]}?"
            )
        _run(script, script_args, is_module)
        return
    from .take_over import (
        ScriptRun,
        take_over,
    )  # imports transformers, which a script that runs as it is may want to do itself

    flags = frozenset(arg[2:].partition("=")[0].replace("-", "_") for arg in rest if arg.startswith("--"))
    run = ScriptRun(script, ours.optim, ours.optim_args, flags)
    take_over(run)
    try:
        _run(script, rest, is_module)
    except SystemExit as end:  # a script may end by sys.exit(main())
        if end.code not in (None, 0) or {"-h", "--help"} & set(rest):
            raise
    if not run.has_trainer:
        raise ScriptError(
            f"{script} has made no Trainer of transformers in this process, so --optim {run.optim} has changed "
            "nothing: use ALSALS in its training loop."
        )
    if not run.has_trained:
        run.say(f"no Trainer of {script} has trained, so --optim {run.optim} has changed nothing.")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # what still holds the process group
        torch.distributed.destroy_process_group()  # a process that ends with it up may abort


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a package that it would lie in
        return False


def _run(script: str, script_args: list[str], is_module: bool) -> None:
    sys.argv = [script, *script_args]
    if is_module:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(script, run_name="__main__")
