"""The main job end to end: a dataset, a base, CoMemo on it, held-out questions and a report."""
