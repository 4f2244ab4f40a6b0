"""`dpnn doctor`: what this machine has, what is missing, and what to do about it. Starts no MPI.

`software.py` looks at what is installed, `system.py` at what the machine allows. `dpnn doctor --ranks` under a launcher
also looks at what lies between the ranks (`between.py`) and their GPUs (`devices.py`).
"""

from pathlib import Path

from dpnn.cluster import software, system
from dpnn.cluster.findings import Finding


def diagnose(data: str) -> list[Finding]:
    """All findings on this machine. `data`: a folder on the file system where the data lie."""
    return [*software.findings(), *system.findings(Path(data))]
