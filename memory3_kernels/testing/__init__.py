"""Installed with the package, so that downstream projects can test and time our ops too."""
