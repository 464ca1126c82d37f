"""A language model that scores, compares or ranks responses by a rubric."""
