"""What this project calls of SciPy, which says no types: without these pyright reads its functions through, a minute long."""
