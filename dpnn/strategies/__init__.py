"""What becomes of gradients and parameters: one strategy a file. Which one runs is chosen in `dpnn.train`.

Where the backend computes on a GPU, `flats` has their arrays on both sides, and `mirrored` lends a strategy that works
on the host's.
"""
