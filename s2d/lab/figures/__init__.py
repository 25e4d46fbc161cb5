"""The published figures: one file for each notebook that measures what they show, drawn from tables alone."""
