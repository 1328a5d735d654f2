"""One line for each package that wplfast's users train with.

Every module here follows the conventions of one package, which is imported with it and is an extra of the installation.
Nothing is imported with this package itself.
"""
