"""How layers are computed: the contract is in `base`, each backend is a folder with the same file names inside."""
