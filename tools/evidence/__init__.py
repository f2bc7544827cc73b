"""Claims put to the test: cells of trainings that differ in a few keys, what they measure, and the page of it."""
