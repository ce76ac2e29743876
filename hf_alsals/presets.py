"""The methods by name: their line searches and the options of ALSALS. Data only."""

from typing import Any

from .acceptance import ArmijoCondition, ParabolaCondition
from .growth import ConstantGrowth
from .initial_search import InitialSearch
from .interval import EverySteps
from .line_search import LineSearch
from .path_growth import PathGrowth

# Raised whenever a preset takes other steps than before, so that results name the method that they are of.
METHOD_VERSION = 19

# The line search of each kind of growth. The defaults of options are those of its parts.
LINE_SEARCHES: dict[str, LineSearch] = {
    search.growth.name: search
    for search in (
        LineSearch(
            growth=PathGrowth(),
            acceptance=ParabolaCondition(),
            interval=EverySteps(10),
            initial_search=InitialSearch(),
            least_shrinkage=0.5,  # the batch may be an outlier
            retry_rejected=False,  # a bad batch is often followed by others, along the same momentum
        ),
        LineSearch(growth=ConstantGrowth(), acceptance=ArmijoCondition(), interval=EverySteps()),
    )
}

# Each method as keyword arguments of ALSALS. adam_sls has the c and the growth (2 in 500 steps) of the authors'
# package salsa-optimizer 0.1.0.
PRESETS: dict[str, dict[str, Any]] = {
    "alsals": {"growth": "path"},
    "alsals_muon": {"growth": "path", "direction": "muon"},
    "alsals_paper": {"growth": "constant", "growth_factor": 1 / 0.999},
    "salsa": {
        "growth": "constant",
        "c": 0.5,
        "growth_factor": 1.1,
        "decrease_factor": 0.8,
        "slope": "preconditioned",
        "search_interval": "adaptive",
    },
    "adam_sls": {
        "growth": "constant",
        "betas": (0.0, 0.999),
        "c": 0.2,
        "beta3": 0.0,
        "growth_factor": 2 ** (1 / 500),
        "slope": "preconditioned",
    },
}


def line_search_of(growth: str | LineSearch, **options: Any) -> LineSearch:
    """Return the line search of a kind of growth.

    Args:
        growth (`str` or `LineSearch`): A name in `LINE_SEARCHES`, or a line search of your own.
        options: Options that are not the default, by the names of `LineSearch.options`.

    Raises:
        TypeError: If an option is unknown or of the wrong type.
        ValueError: If `growth` is unknown, or an option is out of its range.
    """
    if isinstance(growth, LineSearch):
        return growth.with_options(**options)
    if not isinstance(growth, str) or growth not in LINE_SEARCHES:
        raise ValueError(f"growth must be one of {', '.join(LINE_SEARCHES)}, got {growth!r}.")
    return LINE_SEARCHES[growth].with_options(**options)
