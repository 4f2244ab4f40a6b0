"""The job file: TOML read into frozen structs, and every check of a value."""

from dpnn.config.reading import load, parse
from dpnn.config.tables import Backend, Data, Job, Model, Optimizer, Output, Parallel, Schedule, Staleness, Train

__all__ = [
    "Backend",
    "Data",
    "Job",
    "Model",
    "Optimizer",
    "Output",
    "Parallel",
    "Schedule",
    "Staleness",
    "Train",
    "load",
    "parse",
]
