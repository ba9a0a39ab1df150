"""Training: pretraining without memory, continual training with it, and tuning on questions and answers.

Memory3, arXiv 2407.01178, sections 3.5 to 6.2; docs/training.md. `memory3 train` is the command.
"""
