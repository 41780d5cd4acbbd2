"""The core: leaf driver, views, numerics, catalogue, extra arguments and errors.

Nothing here imports from the rest of the package.
"""
