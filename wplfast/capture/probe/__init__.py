"""Which sample owns which row of a call's output, measured.

Gradients of losses weighted with powers of two enter; a sample layout for every call site leaves. It may import the
vocabulary of ``capture`` alone.
"""
