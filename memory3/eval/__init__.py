"""Measured answers: the same questions asked with no memory, with memories, with text, and with the controls.

Nothing in here is trained on (docs/training.md). `sources` holds other people's questions, `sets` what is asked,
`arms` the ways to answer, `run` measures, `report` counts and draws."""
