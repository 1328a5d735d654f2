"""Precompiled Triton kernels.

Typical calls of the operators enter when a wheel is built; archives of compiled kernels leave, from which launches are
served at run time. It may import the kernels beside it and the C++ launcher.
"""
