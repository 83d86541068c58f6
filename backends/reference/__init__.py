"""The NumPy backend: every kernel and optimizer written plainly, as the oracle for the others. Slow on purpose."""
