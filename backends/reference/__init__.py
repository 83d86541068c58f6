"""The NumPy backend: every kernel and optimizer written plainly, as the oracle for the others. Slow on purpose.

backend, ops, optimizer as in every backend; tape: reverse-mode differentiation.
"""
