"""Choose an edit on the dev problems, from a grid or by a search; freeze the choice; report it on the test problems."""
