"""The package's version, apart from the package root so that modules can read it without importing the root."""

__version__ = "0.1.0"
