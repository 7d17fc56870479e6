"""The search: a sampler's proposals and their proxy runs, in any Optuna storage, by any number of workers.

The storage holds facts: which candidate was tried and what its proxy said. Latency and feasibility are priced from the
rows whenever a study is read, so budgets and devices may change while it goes on. Workers need no locks: each adds its
trial, looks at the trials before it, and withdraws where it came second. The trials of a study with one worker and one
job depend on its settings alone: a run killed at any moment and resumed ends with the same ones as one left in peace.
"""

from nas.study.joining import stored_settings
from nas.study.plan import Plan
from nas.study.propose import distributions, to_params
from nas.study.study import Study

__all__ = ["Plan", "Study", "distributions", "stored_settings", "to_params"]
