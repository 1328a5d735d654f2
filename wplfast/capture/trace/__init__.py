"""The forward half of a pass: calls on watched parameters become taps.

Torch functions that consume watched parameters enter; tapped results leave, and a list of call sites. It may import
``rules`` and the vocabulary of ``capture``, not ``probe`` or ``collect``.
"""
