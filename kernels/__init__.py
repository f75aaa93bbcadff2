"""Triton kernels of fastsae: one file per op, each with its kernels, its launcher and its `AOT`
list.

The folder `kernels/` installs as the package `fastsae.kernels`; it imports torch and triton only.
"""

if __name__ != "fastsae.kernels":
    raise ImportError("import fastsae.kernels (the folder kernels/ is no package of its own)")
