"""One script a paper's effect: shown or refuted, with the control beside it."""
