"""Life in a batch system: `signals.py` hears that a run should stop, `slurm.py` submits it, `site.py` knows a site."""
