"""The demo: a bank of references, questions about them, and three ways to answer."""
