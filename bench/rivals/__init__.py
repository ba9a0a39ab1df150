"""Other ways to give a model what it should know, on the same model, bank and kernels (bench/decode)."""
