"""The floor everything stands on: errors, registries, units, run records.

Imports nothing else from fewbits, so every layer may import it.
"""
