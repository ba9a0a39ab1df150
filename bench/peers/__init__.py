"""What users of other libraries would call instead of an op: plain functions, one module per group of ops."""
