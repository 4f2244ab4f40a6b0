"""What becomes of gradients and parameters: one strategy a file. Which one runs is chosen in `dpnn.train`."""
