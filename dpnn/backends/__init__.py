"""How layers are computed: the contract is in `base`, each backend is a folder with the same file names inside.

`reference` is NumPy, `onednn` for CPUs, `cuda` for GPUs. `dpnn.evaluate.choose_backends` chooses.
"""
