"""Generate answers with the original and the edited model, judge them, and compare."""
