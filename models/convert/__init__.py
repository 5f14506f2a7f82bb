"""Published weights, both ways: a rename table for each family."""
