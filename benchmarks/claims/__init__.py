"""One script a paper's claim: does the effect show, beside its control?"""
