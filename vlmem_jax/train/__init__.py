"""Training: one loop over a Task, stages as data, and what they need."""
