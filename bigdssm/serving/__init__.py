"""A model and an index behind HTTP: one small API and one page to try them."""
